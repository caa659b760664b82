-- End a running job as succeeded.
--
-- KEYS  prefix
-- ARGV  now, fence, id, life of the finished job in ms, result
-- Gives {'ok', 'succeeded'}, or {'stale', pool ('' = no such job)}
-- Keeps the fence: a token that is no longer the job's live one changes nothing.
local job = read(ARGV[3])
local again = repeated(job, ARGV[2], 'finish')
if again then
  return { 'ok', again }
end
if not holds(job, ARGV[2]) then
  return { 'stale', job and job.pool or '' }
end
close(job, 'succeeded', clock(), ARGV[4], {
  'result', ARGV[5], 'progress', '1', 'last', mark(ARGV[2], 'finish', 'succeeded'),
})
return { 'ok', 'succeeded' }
