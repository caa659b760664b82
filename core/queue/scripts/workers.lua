-- List the workers whose entry has not lapsed.
--
-- KEYS  prefix
-- ARGV  now, most workers to list
-- Gives the fields of each, by id
-- Keeps nothing: it only reads.
local live = redis.call('ZRANGEBYSCORE', key.workers(), '(' .. whole(clock()), '+inf', 'LIMIT', 0, tonumber(ARGV[2]))
table.sort(live)
local answer = {}
for _, worker in ipairs(live) do
  local entry = redis.call('HGETALL', key.worker(worker))
  if #entry > 0 then
    answer[#answer + 1] = entry
  end
end
return answer
