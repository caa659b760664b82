-- Show the groups of a pool's oldest ready jobs.
--
-- KEYS  prefix
-- ARGV  now, pool, window: how many of the oldest jobs to look at
-- Gives for each group, oldest head first: {group, tag and seq of its head, its jobs in the window, largest
--       overtaken_by among the jobs before its head, live leases on it, '1' if its head is suspect}
-- Keeps nothing: it only reads.
local pool = ARGV[2]
local line = redis.call('ZRANGE', key.ready(pool), 0, tonumber(ARGV[3]) - 1)
local seen, views, worst = {}, {}, 0
for _, member in ipairs(line) do
  local job = redis.call('HMGET', key.job(string.sub(member, 18)), 'group', 'tag', 'seq', 'suspect', 'overtaken_by')
  local view = seen[job[1]]
  if view then
    view[4] = view[4] + 1
  else
    local others = tonumber(redis.call('HGET', key.taken(pool), job[1]) or 0)
    view = { job[1], job[2], job[3], 1, whole(worst), others, job[4] }
    seen[job[1]] = view
    views[#views + 1] = view
  end
  worst = math.max(worst, tonumber(job[5]))
end
return views
