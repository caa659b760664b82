-- Renew a lease and store the progress of its jobs.
--
-- KEYS  prefix
-- ARGV  now, fence, lease in ms, grace in ms of the request id, then job id and progress (0 to 1), any number of times
-- Gives {'ok', ids of the lease's jobs that are to be cancelled ...} or {'stale'}
-- Keeps the fence: a lease that was taken back stays gone, and jobs of other leases are not touched.
--       A full server refuses a script whose first write needs memory. PEXPIRE needs none, so it comes first: running
--       jobs are kept and can end while new ones are refused.
local now = clock()
local fence, lease_ms = ARGV[2], tonumber(ARGV[3])
if not redis.call('ZSCORE', key.leases(), fence) then
  return { 'stale' }
end
local held, answer = {}, { 'ok' }
for _, member in ipairs(redis.call('ZRANGE', key.leased(fence), 0, -1)) do
  local id = string.sub(member, 18)
  held[id] = true
  if redis.call('HGET', key.job(id), 'cancel') == '1' then
    answer[#answer + 1] = id
  end
end
redis.call('PEXPIRE', key.request(redis.call('HGET', key.lease(fence), 'request')), whole(lease_ms + ARGV[4]))
redis.call('ZADD', key.leases(), whole(now + lease_ms), fence)
for index = 5, #ARGV, 2 do
  if held[ARGV[index]] then
    redis.call('HSET', key.job(ARGV[index]), 'progress', ARGV[index + 1])
  end
end
return answer
