-- Cancel a job for its owner: at once if it waits, by asking its worker if it runs.
--
-- KEYS  prefix
-- ARGV  now, tenant, id, life of a finished job in ms
-- Gives the fields of the job, or nothing: the tenant has no such job
-- Keeps a job that is over as it is.
local job = read(ARGV[3])
if not job or job.tenant ~= ARGV[2] then
  return nil
end
if job.state == 'running' then
  redis.call('HSET', key.job(job.id), 'cancel', '1')
elseif job.state == 'queued' or job.state == 'delayed' then
  close(job, 'cancelled', clock(), ARGV[4], { 'cancel', '1' })
end
return redis.call('HGETALL', key.job(job.id))
