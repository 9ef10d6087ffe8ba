-- validate: find a user's active lock of a category for an order, and pin it.
--
-- KEYS[1] book       hash
-- KEYS[2] deadlines  zset
-- KEYS[3] ended      zset
-- ARGV[1] user       integer
-- ARGV[2] category   integer
-- ARGV[3] quantity   integer  the lock must hold at least so many
-- ARGV[4] window_ms  integer  the lock lives at least so much longer
--
-- RETURNS one of
--   {"valid", lock, deadline_ms}   pinned: a disconnect does not move its deadline any more
--   {"not_found"} {"expired"}      nothing changed
--
-- COST O(log n) in active locks of the event; 2 reads, 4 writes, 1 publish.

expire_due()
local held = held_lock(ARGV[1], ARGV[2])
if not held then return {'not_found'} end
if not held.active then return {'expired'} end
if held.quantity < tonumber(ARGV[3]) then return {'not_found'} end

held.deadline = math.max(held.deadline, now + ARGV[4])
held.state = 'pinned'
save_held(held)
tell(held.user, 'pinned ' .. held.lock .. ' ' .. int(held.deadline))
keep(KEYS[2])
keep(KEYS[1])
return {'valid', held.lock, held.deadline}
