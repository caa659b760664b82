-- End a running job as cancelled.
--
-- KEYS  prefix
-- ARGV  now, fence, id, life of the finished job in ms
-- Gives {'ok', 'cancelled'}, or {'stale', pool}
-- Keeps the fence.
local job = read(ARGV[3])
local again = repeated(job, ARGV[2], 'cancelled')
if again then
  return { 'ok', again }
end
if not holds(job, ARGV[2]) then
  return { 'stale', job and job.pool or '' }
end
close(job, 'cancelled', clock(), ARGV[4], { 'last', mark(ARGV[2], 'cancelled', 'cancelled') })
return { 'ok', 'cancelled' }
