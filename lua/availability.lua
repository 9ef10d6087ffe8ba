-- availability: the counts of every category of the event.
--
-- KEYS[1] book        hash
-- KEYS[2] deadlines   zset
-- KEYS[3] ended       zset
-- ARGV[1] channel     text
-- ARGV[2] age_max_ms  integer the oldest snapshot that will do
--
-- RETURNS one of
--   {"known", now_ms, {category, "stock total open active settling version"}, ...}
--   {"stock_unknown"}   no snapshot young enough
--
-- COST O(c) in categories of the event; 2 + c reads.

expire_due()
local stored = redis.call('HGET', KEYS[1], 'stored_ms')
if not stored or now - stored > tonumber(ARGV[2]) then return {'stock_unknown'} end
local reply = {'known', now}
for category in string.gmatch(redis.call('HGET', KEYS[1], 'categories') or '', '%S+') do
  local row = load(category)
  reply[#reply + 1] = {category, table.concat({row.stock, row.total, row.open, row.active, row.settling, row.version}, ' ')}
end
return reply
