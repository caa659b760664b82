-- Enter or renew a worker in the registry.
--
-- KEYS  prefix
-- ARGV  now, worker, life of the entry in ms, then the entry's fields and values; a field that is not named stays
-- Gives nothing
-- Keeps the registry short: entries that have lapsed leave, with all that they said.
local now, worker, ttl_ms = clock(), ARGV[2], tonumber(ARGV[3])
redis.call('ZREMRANGEBYSCORE', key.workers(), '-inf', whole(now))
if not redis.call('ZSCORE', key.workers(), worker) then
  redis.call('DEL', key.worker(worker))
end
redis.call('ZADD', key.workers(), whole(now + ttl_ms), worker)
redis.call('HSET', key.worker(worker), 'id', worker, 'seen_ms', whole(now), unpack(ARGV, 4))
redis.call('PEXPIRE', key.worker(worker), whole(ttl_ms))
