-- accept: store a stock snapshot, and take out of `settling` what it shows, in one step.
--
-- KEYS[1] book       hash
-- KEYS[2] deadlines  zset
-- KEYS[3] ended      zset
-- KEYS[4] settling   zset
-- KEYS[5] sold       zset
-- ARGV[1] number     integer  drawn before the events-service was asked
-- ARGV[2..] four for each category: category, total, stock, open ("1" or "0")
--
-- RETURNS one of
--   {"accepted"}
--   {"older"}   a snapshot with a higher number is stored; nothing changed
--
-- COST O(c + s) in categories and settled locks (1,000 at most a call; the rest waits, which under-counts what is free);
-- 3 + c reads, 3 + c writes, a publish for each category that changed.

local number = tonumber(ARGV[1])
if number <= tonumber(redis.call('HGET', KEYS[1], 'number') or 0) then return {'older'} end

local settled = {}
for _, member in ipairs(redis.call('ZRANGEBYSCORE', KEYS[5], '-inf', '(' .. ARGV[1], 'LIMIT', '0', int(BATCH))) do
  local category, quantity = string.match(member, '^[^|]+|(%d+)|(%d+)|%d+$')
  settled[category] = (settled[category] or 0) + quantity
  redis.call('ZREM', KEYS[5], member)
end

local told, categories = {}, {}
for i = 2, #ARGV, 4 do
  told[ARGV[i]] = { total = ARGV[i + 1], stock = ARGV[i + 2], open = ARGV[i + 3] }
  categories[#categories + 1] = ARGV[i]
end
-- A category that the events-service no longer names is closed and has nothing to sell.
for category in string.gmatch(redis.call('HGET', KEYS[1], 'categories') or '', '%S+') do
  if not told[category] then
    told[category] = { total = '0', stock = '0', open = '0' }
    categories[#categories + 1] = category
  end
end

for _, category in ipairs(categories) do
  local news, row = told[category], load(category)
  local out = settled[category] or 0
  if not row or out > 0 or row.total ~= news.total or row.stock ~= news.stock or row.open ~= news.open then
    row = row or { category = category, active = 0, settling = 0, version = '0', users = 0, released = 0 }
    row.total, row.stock, row.open = news.total, news.stock, news.open
    row.settling = math.max(0, row.settling - out)
    save(row, '')
  end
end
redis.call('HSET', KEYS[1], 'number', ARGV[1], 'stored_ms', int(now), 'categories', table.concat(categories, ' '))
keep(KEYS[1])
return {'accepted'}
