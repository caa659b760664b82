-- Put delayed jobs that are due back in line, with their old tags.
--
-- KEYS  prefix
-- ARGV  now, most jobs to move
-- Gives how many were moved
local now = clock()
local due = redis.call('ZRANGEBYSCORE', key.delayed(), '-inf', whole(now), 'LIMIT', 0, tonumber(ARGV[2]))
for _, id in ipairs(due) do
  move(read(id), 'queued', now, {})
end
return #due
