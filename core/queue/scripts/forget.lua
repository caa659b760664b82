-- Take a worker out of the registry.
--
-- KEYS  prefix
-- ARGV  now, worker
-- Gives nothing
redis.call('ZREM', key.workers(), ARGV[2])
redis.call('DEL', key.worker(ARGV[2]))
