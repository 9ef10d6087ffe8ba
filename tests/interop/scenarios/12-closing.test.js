'use strict';
// Claim: an organiser closes a sale in the middle of it. Every room sees at once that nothing can be had, nobody gets a new
// lock, and who has one keeps it to its own end; nothing that comes back is offered. Opened again, the sale goes on.
// Provoked by: everything that an events-service may say of a closed sale, with a buyer, somebody who gives tickets back, and
// watchers on two replicas.

const assert = require('node:assert/strict');
const check = require('../lib/check.js');
const { scenario } = require('../lib/scenario.js');
const { until } = require('../lib/wait.js');

const EVENT = 1;
const GOLD = 1;
const TOTAL = 10;
const SOLD = 1;

/** How long a page may show tickets that are not for sale any more. */
const AT_ONCE_MS = 2000;

const open = (reserved) => ({ id: EVENT, categories: [{ id: GOLD, total: TOTAL, reserved }] });
const WAYS = [
  {
    what: 'its categories are closed',
    transport: 'tcp',
    close: (stock, reserved) => stock.call('put', { id: EVENT, categories: [{ id: GOLD, total: TOTAL, reserved, isActive: false }] }),
    total: TOTAL,
  },
  {
    what: 'the event is closed',
    transport: 'rmq',
    withoutCategories: true,
    close: (stock, reserved) => stock.call('put', { ...open(reserved), isActive: false }),
    total: TOTAL,
  },
  {
    what: 'its categories are listed no more',
    transport: 'tcp',
    close: (stock) => stock.call('put', { id: EVENT, categories: [] }),
    total: 0,
  },
  {
    what: 'the event is known no more',
    transport: 'rmq',
    close: (stock) => stock.call('remove', { eventId: EVENT }),
    total: 0,
  },
];

/** Until every replica has read the counts of its rooms anew, twice: what it makes of them is on its metrics then. */
async function weighed(replicas) {
  const readings = async (replica) => {
    const { text } = await replica.http('/metrics');
    return Number(/^seatlock_ledger_call_seconds_count\{script="availability"\} (\d+)$/m.exec(text)?.[1] ?? 0);
  };
  for (const replica of replicas) {
    const before = await readings(replica);
    await until(15_000, `${replica.name} has read its rooms twice`, async () => (await readings(replica)) >= before + 2, 200);
  }
}

for (const { what, transport, withoutCategories, close, total } of WAYS) {
  scenario(`closing: ${what}, stock over ${transport}`, async (stage) => {
    const stock = await stage.events({ transport, withoutCategories, events: [open(SOLD)] });
    const { a, b, replicas } = await stage.fleet();
    const orders = await stage.orders(11);
    const buyer = await stage.client(a, 7, { name: 'buyer' });
    const leaver = await stage.client(b, 8, { name: 'leaver' });
    const watchers = [await stage.client(a, 91, { name: 'watcher' }), await stage.client(b, 92, { name: 'watcher' })];
    for (const client of [buyer, leaver, ...watchers]) await client.join(EVENT);
    const wish = { eventId: EVENT, categoryId: GOLD, quantity: 2 };
    const held = await buyer.lock(EVENT, GOLD, 2, { requestId: 'r-1' });
    check.granted(held, wish);
    check.granted(await leaver.lock(EVENT, GOLD, 3), { ...wish, quantity: 3 });
    await stage.agree(EVENT, GOLD, { availableTickets: TOTAL - SOLD - 5, lockedTickets: 5 });

    const marks = new Map([buyer, leaver, ...watchers].map((client) => [client, client.mark()]));
    await close(stock, SOLD);
    await orders.call('emit', { pattern: 'availability-changed', data: { eventId: EVENT } });
    for (const client of marks.keys()) {
      const told = await client.update(GOLD, (update) => update.availableTickets === 0, {
        from: marks.get(client), within: AT_ONCE_MS, what: 'nothing is for sale',
      });
      check.availability(told, { lockedTickets: 5, totalTickets: total, status: 'temporarily-unavailable' });
      marks.set(client, client.history.findIndex((entry) => entry.data === told));
    }
    for (const replica of replicas) {
      const late = await stage.client(replica, 30, { name: 'late' });
      check.availability((await late.join(EVENT)).availability[0], { availableTickets: 0, lockedTickets: 5 });
      check.refused(await late.lock(EVENT, GOLD, 1), 'event_closed', 'Ticket sales are closed');
      late.close();
    }
    check.refused(await watchers[0].lock(EVENT, GOLD, 1), 'event_closed', 'Ticket sales are closed');

    // Who holds a lock has it, is told of it again, and may give it back; what comes back is not offered.
    assert.equal((await buyer.lock(EVENT, GOLD, 2, { requestId: 'r-1' })).lockId, held.lockId);
    assert.deepEqual((await buyer.ask('get-my-locks')).locks.map((lock) => lock.lockId), [held.lockId]);
    await weighed(replicas);
    for (const replica of replicas) {
      assert.match((await replica.http('/metrics')).text, /^seatlock_fanout_oversold_categories 0$/m, 'nobody is woken up for it');
    }
    assert.equal((await leaver.ask('unlock-tickets', { eventId: EVENT, categoryId: GOLD })).success, true);
    const back = await watchers[0].next('tickets-released-by-other-user', { from: marks.get(watchers[0]) });
    assert.deepEqual(back, { eventId: EVENT, categoryId: GOLD, quantity: 3, reason: 'released' });
    await stage.agree(EVENT, GOLD, { availableTickets: 0, lockedTickets: 2, totalTickets: total });

    // The lock becomes a sale: what the events-service makes of that is its own affair.
    const found = await orders.send('validate-user-locks', { userId: 7, ...wish });
    assert.deepEqual([found.valid, found.lockId], [true, held.lockId]);
    assert.equal(await orders.send('confirm-lock', { lockId: held.lockId, userId: 7, orderId: 501 }), true);
    check.lock(await orders.send('get-lock', { lockId: held.lockId }), { status: 'confirmed' });
    if (total > 0) await stock.call('sell', wish);
    await orders.call('emit', { pattern: 'order-completed', data: { orderId: 501, userId: 7, lockId: held.lockId, ...wish } });
    await buyer.next('order-completed', { where: (data) => data.orderId === 501 });
    await stage.agree(EVENT, GOLD, { availableTickets: 0, lockedTickets: 0, status: 'sold-out' });
    for (const client of marks.keys()) {
      const updates = client.all('availability-update', { from: marks.get(client) });
      assert.ok(updates.every((update) => update.availableTickets === 0), `${client.name}: ${JSON.stringify(updates)}`);
    }

    const reopened = watchers.map((client) => client.mark());
    await stock.call('put', open(SOLD + 2));
    await orders.call('emit', { pattern: 'availability-changed', data: { eventId: EVENT } });
    for (const [i, client] of watchers.entries()) {
      const told = await client.update(GOLD, (update) => update.availableTickets > 0, { from: reopened[i], what: 'it is open again' });
      check.availability(told, { availableTickets: TOTAL - SOLD - 2, lockedTickets: 0, totalTickets: TOTAL, status: 'available' });
      check.ordered(client, GOLD);
    }
    check.granted(await watchers[1].lock(EVENT, GOLD, 1), { ...wish, quantity: 1 });
  });
}
