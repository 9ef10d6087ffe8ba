-- adopt: a session of the user began; abandoned locks get their deadline back.
--
-- KEYS[1] book        hash
-- KEYS[2] deadlines   zset
-- KEYS[3] ended       zset
-- ARGV[1] user        integer
-- ARGV[2] generation  integer the user's presence generation of that session
--
-- RETURNS
--   {"adopted", {lock, category, quantity, created_ms, deadline_ms, state}, ...}   the user's active locks
--
-- COST O(c + log n) in categories and active locks; 1 + c reads, 2 writes a lock.

local reply = {'adopted'}
local generation = tonumber(ARGV[2])
for category in string.gmatch(redis.call('HGET', KEYS[1], 'categories') or '', '%S+') do
  local held = held_lock(ARGV[1], category)
  if held and held.active then
    if held.generation < generation then
      held.generation = generation
      if held.state == 'abandoned' then
        held.state = 'attended'
        held.deadline, held.cut = held.deadline + held.cut, 0
      end
      save_held(held)
    end
    reply[#reply + 1] = {held.lock, category, int(held.quantity), held.created, int(held.deadline), held.state}
  end
end
return reply
