-- confirm: turn an active lock into a sale that is being settled.
--
-- KEYS[1] book        hash
-- KEYS[2] deadlines   zset
-- KEYS[3] ended       zset
-- KEYS[4] settling    zset
-- KEYS[5] lock        string
-- KEYS[6] order       string  what is remembered of the order; KEYS[5] again when none is said
-- ARGV[1] lock        text
-- ARGV[2] user        integer "" when the caller does not say
-- ARGV[3] order       text    "" when the caller does not say
-- ARGV[4] settle_ms   integer the order must be reported within this
--
-- RETURNS one of
--   {"confirmed", held_ms}            held_ms: how long the lock was active
--   {"confirmed_reported", held_ms}   the order was reported before: count it again, now that its lock is known
--   {"already_confirmed"}    a repeat; an order that is not reported has settle_ms from now on
--   {"other_order"} {"wrong_user"} {"expired"} {"released"} {"not_found"}   nothing changed
--
-- COST O(log n) in active locks of the event; 6 reads, 10 writes, 2 publishes.

expire_due()
local text = redis.call('GET', KEYS[5])
if not text then return {'not_found'} end
local status, _, _, order, facts = string.match(text, ENDED)
local user, category, quantity, created = string.match(facts or text, FACTS)
if ARGV[2] ~= '' and ARGV[2] ~= user then return {'wrong_user'} end
local member = member_of(ARGV[1], category, quantity, user)
if status == 'confirmed' then
  if order ~= '' and ARGV[3] ~= '' and order ~= ARGV[3] then return {'other_order'} end
  -- Whoever asks again is still at work on the order.
  if redis.call('ZSCORE', KEYS[4], member) then
    redis.call('ZADD', KEYS[4], int(now + ARGV[4]), member)
  end
  return {'already_confirmed'}
end
if status == 'released' then return {'released'} end
local field = user .. ':' .. category
local held, sums = unpack(redis.call('HMGET', KEYS[1], field, user .. ':'))
local active, deadline = active_of(held)
if active ~= ARGV[1] then return {'expired'} end
local reported = ARGV[3] ~= '' and redis.call('EXISTS', KEYS[6]) == 1

redis.call('ZREM', KEYS[2], member)
settle(ARGV[1], category, quantity, user, ARGV[3], ARGV[4])
local fewer = hold(user, sums, -1, 0, field)
redis.call('SET', KEYS[5], 'confirmed ' .. deadline .. ' - ' .. ARGV[3] .. ' ' .. text, 'PX', CONFIRMED_MS)
redis.call('HINCRBY', KEYS[1], '#confirmed', '1')
local row = load(category)
if row then
  row.active, row.users = math.max(0, row.active - quantity), row.users - fewer
  row.settling = row.settling + quantity
  save(row, '')
end
tell(user, 'confirmed ' .. ARGV[1] .. (ARGV[3] == '' and '' or ' ' .. ARGV[3]))
keep(KEYS[1])
keep(KEYS[4])
return {reported and 'confirmed_reported' or 'confirmed', now - created}
