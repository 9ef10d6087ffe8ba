-- availability: the counts of every category of the event.
--
-- KEYS[1] book        hash
-- KEYS[2] deadlines   zset
-- KEYS[3] ended       zset
-- ARGV[1] age_max_ms  integer the oldest snapshot that will do
--
-- RETURNS one of the texts
--   "known now_ms category stock total open active settling version category stock ..."
--   "stock_unknown"   no snapshot young enough
--
-- COST O(c) in categories of the event; 2 + c reads.

expire_due()
local stored, categories = unpack(redis.call('HMGET', KEYS[1], 'stored_ms', 'categories'))
if not stored or now - stored > tonumber(ARGV[1]) then return 'stock_unknown' end
local rows = {}
for category in string.gmatch(categories or '', '%S+') do
  local row = redis.call('HGET', KEYS[1], category)
  rows[#rows + 1] = ' ' .. category .. ' ' .. string.match(row, '^%d+ %d+ [01] %d+ %d+ %d+')
end
return 'known ' .. now_text .. table.concat(rows)
