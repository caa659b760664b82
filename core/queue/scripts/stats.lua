-- Count, by pool.
--
-- KEYS  prefix
-- ARGV  now
-- Gives for each pool, by name: {pool, queued, delayed, running, groups, leases, age of the head of the line in ms,
--       leases that ever expired, dead letters ever}
-- Keeps nothing: it only reads, and no more than a few counters per pool.
local now = clock()
local pools = redis.call('SMEMBERS', key.pools())
table.sort(pools)
local answer = {}
for _, pool in ipairs(pools) do
  local counts = redis.call('HMGET', key.count(pool), 'delayed', 'running', 'leases')
  local totals = redis.call('HMGET', key.totals(pool), 'expired', 'dead')
  local head, age = redis.call('ZRANGE', key.ready(pool), 0, 0)[1], 0
  if head then
    age = math.max(0, now - tonumber(redis.call('HGET', key.job(string.sub(head, 18)), 'ready_ms')))
  end
  answer[#answer + 1] = {
    pool, redis.call('ZCARD', key.ready(pool)), tonumber(counts[1] or 0), tonumber(counts[2] or 0),
    redis.call('HLEN', key.groups(pool)), tonumber(counts[3] or 0), whole(age),
    tonumber(totals[1] or 0), tonumber(totals[2] or 0),
  }
end
return answer
