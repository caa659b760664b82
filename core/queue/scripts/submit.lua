-- Take a job into its pool's line.
--
-- KEYS  prefix
-- ARGV  now, id, tenant, pool, group, spec, cost, credit, priority, max_attempts, body hash, hashed idempotency key
--       ('' = none), its life in ms, most jobs that the tenant may have waiting
-- Gives {'new' | 'replay', id}, {'conflict', id}: that idempotency key came with another body, {'taken'}: another
--       tenant's job has this id, or {'full'}
-- Keeps start-time fair queueing (Goyal, Vin and Cheng 1996): a job starts where its tenant's last one ends, but
--       not before the pool's virtual time. Priority moves a job within the line by a bounded credit and leaves its
--       tenant's virtual time alone: else every credited job would also make the next one cheaper.
--       An id that is there already is the same call again, its first reply lost.
local now = clock()
local id, tenant, pool, group = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local cost, credit = tonumber(ARGV[7]), tonumber(ARGV[8])
local body, idem = ARGV[11], ARGV[12]

if idem ~= '' then
  local was = redis.call('GET', key.idem(tenant, idem))
  if was then
    local was_body, was_id = string.match(was, '^([^:]*):(.*)$')
    return { was_body == body and 'replay' or 'conflict', was_id }
  end
end
local owner = redis.call('HGET', key.job(id), 'tenant')
if owner then
  return { owner == tenant and 'replay' or 'taken', id }
end
if tonumber(redis.call('HGET', key.waiting(), tenant) or 0) >= tonumber(ARGV[14]) then
  return { 'full' }
end

local start = math.max(tonumber(redis.call('GET', key.v(pool)) or 0),
  tonumber(redis.call('HGET', key.vt(pool), tenant) or 0))
local seq = string.format('%016d', redis.call('INCR', key.seq()))
local job = {
  id = id, tenant = tenant, pool = pool, group = group, tag = whole(start - credit), member = seq .. ':' .. id,
}
redis.call('HSET', key.vt(pool), tenant, whole(start + cost))
redis.call('HSET', key.job(id), 'id', id, 'tenant', tenant, 'pool', pool, 'group', group, 'spec', ARGV[6],
  'cost', whole(cost), 'state', 'queued', 'priority', ARGV[9], 'max_attempts', ARGV[10], 'tag', job.tag,
  'seq', seq, 'member', job.member, 'attempt', '0', 'crashes', '0', 'suspect', '0', 'cancel', '0', 'fence', '',
  'overtaken_by', '0', 'created_ms', whole(now))
enter.queued(job, now)
redis.call('SADD', key.pools(), pool)
if idem ~= '' then
  redis.call('SET', key.idem(tenant, idem), body .. ':' .. id, 'PX', ARGV[13])
end
tell(job, 'queued', now)
return { 'new', id }
