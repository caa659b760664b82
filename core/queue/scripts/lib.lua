-- What the verbs share. scripts.py puts it, after the table `key`, in front of each of them.
--
-- KEYS[1] of every verb is the prefix of all names, ARGV[1] the time in ms ('' = the server's own clock).
-- A verb reads and checks first and writes last: a script that fails half-way keeps what it wrote. A full server
-- refuses a script at its first write, if that one needs memory, or never: submit and claim write nothing then, and
-- verbs that end or give back jobs begin by removing something and go through.

-- Numbers as text. tostring() would round to 14 digits; tags and costs are whole numbers below 2^53.
local function whole(number)
  return string.format('%.0f', number)
end

local function clock()
  if ARGV[1] ~= '' then
    return tonumber(ARGV[1])
  end
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Add to a counter in a hash; a counter that comes to 0 leaves.
local function count(name, field, by)
  if redis.call('HINCRBY', name, field, by) == 0 then
    redis.call('HDEL', name, field)
  end
end

-- The fields of a job by which verbs decide, or nil when there is no such job.
local function read(id)
  local v = redis.call('HMGET', key.job(id), 'state', 'pool', 'tenant', 'group', 'tag', 'member', 'attempt',
    'max_attempts', 'crashes', 'suspect', 'cancel', 'fence', 'last')
  if not v[1] then
    return nil
  end
  return {
    id = id, state = v[1], pool = v[2], tenant = v[3], group = v[4], tag = v[5], member = v[6],
    attempt = tonumber(v[7]), max_attempts = tonumber(v[8]), crashes = tonumber(v[9]),
    suspect = v[10] == '1', cancel = v[11] == '1', fence = v[12], last = v[13],
  }
end

local function end_lease(fence)
  local lease = redis.call('HMGET', key.lease(fence), 'pool', 'group', 'request')
  redis.call('ZREM', key.leases(), fence)
  redis.call('DEL', key.lease(fence), key.request(lease[3]))
  count(key.count(lease[1]), 'leases', -1)
  count(key.taken(lease[1]), lease[2], -1)
end

-- leave[state] and enter[state] keep the indexes and counters of a state, and enter the fields that only it has.
-- A lease ends with its last job.
local leave, enter = {}, {}

function leave.queued(job)
  redis.call('ZREM', key.ready(job.pool), job.member)
  count(key.groups(job.pool), job.group, -1)
  count(key.lined(job.pool), job.tenant, -1)
  count(key.waiting(), job.tenant, -1)
end

function enter.queued(job, now)
  redis.call('ZADD', key.ready(job.pool), job.tag, job.member)
  count(key.groups(job.pool), job.group, 1)
  count(key.lined(job.pool), job.tenant, 1)
  count(key.waiting(), job.tenant, 1)
  redis.call('HSET', key.job(job.id), 'ready_ms', whole(now), 'due_ms', '0', 'progress', '0')
end

function leave.delayed(job)
  redis.call('ZREM', key.delayed(), job.id)
  count(key.count(job.pool), 'delayed', -1)
  count(key.waiting(), job.tenant, -1)
end

function enter.delayed(job, _, due)
  redis.call('ZADD', key.delayed(), whole(due), job.id)
  count(key.count(job.pool), 'delayed', 1)
  count(key.waiting(), job.tenant, 1)
  redis.call('HSET', key.job(job.id), 'due_ms', whole(due), 'progress', '0')
end

function leave.running(job)
  redis.call('ZREM', key.leased(job.fence), job.member)
  count(key.count(job.pool), 'running', -1)
  count(key.inflight(), job.tenant, -1)
  if redis.call('EXISTS', key.leased(job.fence)) == 0 then
    end_lease(job.fence)
  end
  redis.call('HSET', key.job(job.id), 'fence', '')
end

function enter.running(job, now, fence)
  redis.call('ZADD', key.leased(fence), job.tag, job.member)
  count(key.count(job.pool), 'running', 1)
  count(key.inflight(), job.tenant, 1)
  redis.call('HSET', key.job(job.id), 'fence', fence, 'started_ms', whole(now), 'progress', '0')
end

-- One line of the outbox.
local function tell(job, state, now)
  redis.call('XADD', key.out(), 'MAXLEN', '~', limits.out, '*',
    'id', job.id, 'state', state, 'pool', job.pool, 'tenant', job.tenant, 'at_ms', whole(now))
end

-- Move a job to a state that is not terminal. `detail`: due time of a delayed job, fence of a running one;
-- `fields`: what else changes, as {name, value, ...}.
local function move(job, state, now, fields, detail)
  leave[job.state](job)
  enter[state](job, now, detail)
  redis.call('HSET', key.job(job.id), 'state', state, unpack(fields))
  tell(job, state, now)
end

-- Move a job to a terminal state; it is forgotten after ttl_ms.
local function close(job, state, now, ttl_ms, fields)
  leave[job.state](job)
  redis.call('HSET', key.job(job.id), 'state', state, 'finished_ms', whole(now), unpack(fields))
  redis.call('PEXPIRE', key.job(job.id), ttl_ms)
  tell(job, state, now)
end

-- Enter a failed job among the dead letters, of which the oldest give way.
local function bury(job, now, ttl_ms)
  count(key.totals(job.pool), 'dead', 1)
  redis.call('ZADD', key.dead(), whole(now), job.id)
  redis.call('ZREMRANGEBYSCORE', key.dead(), '-inf', whole(now - ttl_ms))
  redis.call('ZREMRANGEBYRANK', key.dead(), 0, -limits.dead - 1)
end

-- Is the job running under this token?
local function holds(job, fence)
  return job and job.state == 'running' and job.fence == fence
end

-- A reply can be lost after its script ran, and the call comes again. `last` remembers the call that ended a
-- job's last lease; the same call again changes nothing and gets the same answer (a state), any other nil.
local function mark(fence, verb, state)
  return fence .. ' ' .. verb .. ' ' .. state
end

local function repeated(job, fence, verb)
  if not job or not job.last then
    return nil
  end
  local was_fence, was_verb, was_state = string.match(job.last, '^(%S+) (%S+) (%S+)$')
  if was_fence == fence and was_verb == verb then
    return was_state
  end
  return nil
end
