// A plain socket.io room in one process: counts in memory, every change told to the room at once.

'use strict';

const { serve } = require('./common');

const EVENT = 1;
const CATEGORY = 1;
const ROOM = `e:${EVENT}`;
const counts = { total: Number(process.env.SEATS), locked: 0, version: Date.now() * 1000 };
const locks = new Map();
let made = 0;

const availability = () => ({
  eventId: EVENT,
  categoryId: CATEGORY,
  availableTickets: counts.total - counts.locked,
  lockedTickets: counts.locked,
  totalTickets: counts.total,
  timestamp: new Date().toISOString(),
  status: 'available',
  version: counts.version,
});

serve((socket, namespace) => {
  const changed = (name, data) => {
    counts.version += 1;
    namespace.to(ROOM).emit('availability-update', availability());
    socket.to(ROOM).emit(name, data);
  };
  socket.emit('connected', { success: true, sessionId: socket.id, message: 'Connected', userId: socket.data.user });
  socket.on('join-event-room', () => {
    socket.join(ROOM);
    socket.emit('joined-event-room', { success: true, eventId: EVENT, message: 'Joined' });
    socket.emit('availability-update', availability());
  });
  socket.on('lock-tickets', ({ quantity }, answer) => {
    if (counts.locked + quantity > counts.total) return answer({ success: false, message: 'Only 0 tickets available' });
    const lockId = `lock-${++made}`;
    locks.set(lockId, quantity);
    counts.locked += quantity;
    answer({ success: true, lockId, availableTickets: counts.total - counts.locked });
    return changed('tickets-locked-by-other-user', { eventId: EVENT, categoryId: CATEGORY, quantity });
  });
  socket.on('unlock-tickets', ({ lockId }, answer) => {
    const quantity = locks.get(lockId);
    if (!quantity) return answer({ success: false, message: 'No tickets found to unlock' });
    locks.delete(lockId);
    counts.locked -= quantity;
    answer({ success: true, message: 'Tickets unlocked successfully', lockId });
    return changed('tickets-released-by-other-user',
      { eventId: EVENT, categoryId: CATEGORY, quantity, reason: 'released' });
  });
});
