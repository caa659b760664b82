-- End a run as failed.
--
-- KEYS  prefix
-- ARGV  now, fence, id, life of the finished job in ms, error, delay of the retry in ms ('' = no retry)
-- Gives {'ok', state}: 'delayed' while a retry is asked for and attempts are left, 'cancelled' instead of a retry if
--       its owner asked for that, else 'failed'; or {'stale', pool}
-- Keeps the fence. A failed job is a dead letter. A worker that could report the failure outlived the job: it is
--       no longer suspect.
local now, fence, ttl_ms = clock(), ARGV[2], ARGV[4]
local job = read(ARGV[3])
local again = repeated(job, fence, 'fail')
if again then
  return { 'ok', again }
end
if not holds(job, fence) then
  return { 'stale', job and job.pool or '' }
end
local state = 'failed'
if ARGV[6] ~= '' and job.attempt < job.max_attempts then
  state = job.cancel and 'cancelled' or 'delayed'
end
local fields = { 'error', ARGV[5], 'suspect', '0', 'last', mark(fence, 'fail', state) }
if state == 'delayed' then
  move(job, 'delayed', now, fields, now + tonumber(ARGV[6]))
else
  close(job, state, now, ttl_ms, fields)
end
if state == 'failed' then
  bury(job, now, ttl_ms)
end
return { 'ok', state }
