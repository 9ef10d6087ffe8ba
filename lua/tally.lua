-- tally: one event's counts for the fleet's statistics.
--
-- KEYS[1] book       hash
-- KEYS[2] deadlines  zset
--
-- RETURNS
--   {"tally", active, expired, confirmed, released, users, categories}
--
-- COST O(c) in categories of the event; 2 + c reads.

local expired, confirmed, categories = unpack(redis.call('HMGET', KEYS[1], '#expired', '#confirmed', 'categories'))
local sum = { users = 0, released = 0, locked = 0 }
for category in string.gmatch(categories or '', '%S+') do
  local text = redis.call('HGET', KEYS[1], category)
  local active, users, released = string.match(text, '^%d+ %d+ [01] (%d+) %d+ %d+ (%S+) (%d+)$')
  sum.users, sum.released = sum.users + users, sum.released + released
  if active ~= '0' then sum.locked = sum.locked + 1 end
end
return {
  'tally', redis.call('ZCOUNT', KEYS[2], '-inf', '(inf'), tonumber(expired or 0), tonumber(confirmed or 0), sum.released,
  sum.users, sum.locked,
}
