-- Give running jobs back to their old place in line, without an attempt.
--
-- KEYS  prefix
-- ARGV  now, fence, life of a finished job in ms, then job ids
-- Gives {'ok'} or {'stale', pool}: then no job was moved
-- Keeps the fence. A job whose owner asked to cancel it ends cancelled instead.
local now, fence = clock(), ARGV[2]
local jobs = {}
for index = 4, #ARGV do
  local job = read(ARGV[index])
  if not repeated(job, fence, 'release') then
    if not holds(job, fence) then
      return { 'stale', job and job.pool or '' }
    end
    jobs[#jobs + 1] = job
  end
end
for _, job in ipairs(jobs) do
  local state = job.cancel and 'cancelled' or 'queued'
  local fields = { 'attempt', job.attempt - 1, 'last', mark(fence, 'release', state) }
  if job.cancel then
    close(job, state, now, ARGV[3], fields)
  else
    move(job, state, now, fields)
  end
end
return { 'ok' }
