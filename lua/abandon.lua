-- abandon: the user's last session ended; each unpinned lock lives a grace more at most.
--
-- KEYS[1] book        hash
-- KEYS[2] deadlines   zset
-- KEYS[3] ended       zset
-- ARGV[1] user        integer
-- ARGV[2] generation  integer the user's presence generation of that end: a lock that has seen a later one is left alone
-- ARGV[3] grace_ms    integer
--
-- RETURNS
--   {"abandoned", moved, active}   locks whose deadline was moved; locks that are active
--
-- COST O(c + log n) in categories and active locks; 1 + c reads, a read and 2 writes a lock.

local generation, moved, active = tonumber(ARGV[2]), 0, 0
for category in string.gmatch(redis.call('HGET', KEYS[1], 'categories') or '', '%S+') do
  local held = held_lock(ARGV[1], category)
  if held and held.active then
    active = active + 1
    if held.state == 'attended' and held.generation <= generation then
      held.generation = generation
      held.state = 'abandoned'
      held.cut = math.max(0, held.deadline - now - ARGV[3])
      held.deadline = held.deadline - held.cut
      save_held(held)
      moved = moved + 1
      local due = redis.call('HGET', KEYS[1], 'due_ms')
      if due and held.deadline < tonumber(due) then redis.call('HSET', KEYS[1], 'due_ms', int(held.deadline)) end
    end
  end
end
return {'abandoned', moved, active}
