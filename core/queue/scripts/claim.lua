-- Lease jobs of one group, oldest first, under a new fence.
--
-- KEYS  prefix
-- ARGV  now, pool, group, worker, limit, request id, lease in ms, random part of the fence, slack, window,
--       grace in ms of the request id beyond the lease
-- Gives {fence, group, expiry in ms, {fields of a job}, ...}, or nothing: the group has no ready job among the oldest
--       `window` of the pool, or may not be taken now
-- Keeps the bound on overtaking, exactly and per job. A job that is passed (older, ready, not in the batch) has the
--       cost of what passed it added to overtaken_by; nothing may pass a job that has `slack` already. So
--       overtaken_by stays below slack plus the cost of one job. The head of the line passes nobody: it can always
--       be claimed, and no worker idles while a job is ready.
--       A suspect job is leased alone. The same request id gives the same lease while that is live, renewed.
--       Virtual time never falls and moves on by each claim's fair share: cost / tenants in line. Were it only the
--       tag of what is served, an endless stream of new tenants could all enter at a time that never moves.
local now = clock()
local pool, group, worker, limit = ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
local request, lease_ms, slack = ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[9])
local remember_ms = whole(lease_ms + tonumber(ARGV[11]))
local expiry = whole(now + lease_ms)

local function reply(fence)
  local answer = { fence, redis.call('HGET', key.lease(fence), 'group'), expiry }
  for _, member in ipairs(redis.call('ZRANGE', key.leased(fence), 0, -1)) do
    answer[#answer + 1] = redis.call('HGETALL', key.job(string.sub(member, 18)))
  end
  return answer
end

local had = redis.call('GET', key.request(request))
if had and redis.call('ZSCORE', key.leases(), had) then
  redis.call('ZADD', key.leases(), expiry, had)
  redis.call('PEXPIRE', key.request(request), remember_ms)
  return reply(had)
end

-- Choose the batch. `worst` is the largest overtaken_by among the passed, with this batch's cost so far.
local line = redis.call('ZRANGE', key.ready(pool), 0, tonumber(ARGV[10]) - 1)
local batch, passed, total, worst = {}, {}, 0, 0
for _, member in ipairs(line) do
  local id = string.sub(member, 18)
  local v = redis.call('HMGET', key.job(id), 'group', 'cost', 'overtaken_by', 'suspect')
  if v[1] ~= group then
    passed[#passed + 1] = { id = id, before = total }
    worst = math.max(worst, tonumber(v[3]))
  else
    local suspect, cost = v[4] == '1', tonumber(v[2])
    if (#passed > 0 and worst >= slack) or (suspect and #batch > 0) then
      break
    end
    batch[#batch + 1] = id
    total = total + cost
    worst = #passed > 0 and worst + cost or 0
    if suspect or #batch == limit then
      break
    end
  end
end
if #batch == 0 then
  return nil
end

for _, job in ipairs(passed) do
  if total > job.before then
    redis.call('HINCRBY', key.job(job.id), 'overtaken_by', whole(total - job.before))
  end
end
local head_tag = tonumber(redis.call('ZSCORE', key.ready(pool), line[1]))
local share = math.floor(total / redis.call('HLEN', key.lined(pool)))
local v = math.max(tonumber(redis.call('GET', key.v(pool)) or 0) + share, head_tag)
redis.call('SET', key.v(pool), whole(v))

local fence = redis.call('INCR', key.fence()) .. '-' .. ARGV[8]
redis.call('ZADD', key.leases(), expiry, fence)
redis.call('HSET', key.lease(fence), 'pool', pool, 'group', group, 'worker', worker, 'request', request)
redis.call('SET', key.request(request), fence, 'PX', remember_ms)
count(key.count(pool), 'leases', 1)
count(key.taken(pool), group, 1)
for _, id in ipairs(batch) do
  local job = read(id)
  move(job, 'running', now, { 'worker', worker, 'attempt', job.attempt + 1 }, fence)
  if redis.call('HEXISTS', key.lined(pool), job.tenant) == 0
      and tonumber(redis.call('HGET', key.vt(pool), job.tenant) or 0) <= v then
    redis.call('HDEL', key.vt(pool), job.tenant)
  end
end
return reply(fence)
