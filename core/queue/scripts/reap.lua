-- Take back the jobs of leases that have expired.
--
-- KEYS  prefix
-- ARGV  now, most leases to take back, life of a finished job in ms, crashes that end a job, error of such a job
-- Gives for each lease {fence, pool, {ids back in line}, {ids that failed}, {ids that were cancelled}}
-- Keeps blame exact. A lease covers a batch, so its loss says little of one job: jobs come back to their old place
--       as suspects, with the attempt not counted. Only a job that ran alone as a suspect is charged with a crash;
--       too many of them and it is a dead letter. A job whose owner asked to cancel it ends cancelled.
local now, ttl_ms, crashes_max = clock(), ARGV[3], tonumber(ARGV[4])
local expired = redis.call('ZRANGEBYSCORE', key.leases(), '-inf', whole(now), 'LIMIT', 0, tonumber(ARGV[2]))
local answer = {}
for _, fence in ipairs(expired) do
  local pool, requeued, failed, cancelled = redis.call('HGET', key.lease(fence), 'pool'), {}, {}, {}
  for _, member in ipairs(redis.call('ZRANGE', key.leased(fence), 0, -1)) do
    local job = read(string.sub(member, 18))
    local crashes = job.crashes + (job.suspect and 1 or 0)
    local fields = { 'suspect', '1', 'crashes', crashes, 'attempt', job.attempt - (job.suspect and 0 or 1) }
    if job.cancel then
      close(job, 'cancelled', now, ttl_ms, fields)
      cancelled[#cancelled + 1] = job.id
    elseif crashes >= crashes_max then
      fields[#fields + 1] = 'error'
      fields[#fields + 1] = ARGV[5]
      close(job, 'failed', now, ttl_ms, fields)
      bury(job, now, ttl_ms)
      failed[#failed + 1] = job.id
    else
      move(job, 'queued', now, fields)
      requeued[#requeued + 1] = job.id
    end
  end
  count(key.totals(pool), 'expired', 1)
  answer[#answer + 1] = { fence, pool, requeued, failed, cancelled }
end
return answer
