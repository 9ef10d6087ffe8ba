-- tally: one event's counts for the fleet's statistics.
--
-- KEYS[1] counts     hash
-- KEYS[2] deadlines  zset
--
-- RETURNS
--   {"tally", active, expired, confirmed, released, users, categories}
--
-- COST O(c) in categories of the event; 3 + c reads.

local ended = redis.call('HMGET', KEYS[1], '#expired', '#confirmed', '#released', '#users', 'categories')
local locked = 0
for category in string.gmatch(ended[5] or '', '%S+') do
  local active = string.match(redis.call('HGET', KEYS[1], category) or '', '^%d+ %d+ [01] (%d+)')
  if active and active ~= '0' then locked = locked + 1 end
end
return {
  'tally', redis.call('ZCARD', KEYS[2]), tonumber(ended[1] or 0), tonumber(ended[2] or 0), tonumber(ended[3] or 0),
  tonumber(ended[4] or 0), locked,
}
