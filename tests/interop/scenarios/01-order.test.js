'use strict';
// Claim: a buyer locks in the browser, an unchanged orders-service turns the lock into a sale, and a watcher on another
// replica sees the tickets go once and never come back in between.
// Provoked by: both flows, called from Nest 11 and Nest 10, with the stock behind NestJS TCP and NestJS RabbitMQ.

const assert = require('node:assert/strict');
const check = require('../lib/check.js');
const { scenario } = require('../lib/scenario.js');

const EVENT = 1;
const GOLD = 1;
const TOTAL = 10;
const QUANTITY = 2;

for (const [transport, eventsMajor] of [['tcp', 10], ['rmq', 11]]) {
  for (const flow of ['create-order', 'create-order-with-lock']) {
    scenario(`order: ${flow} from Nest 11 and Nest 10, stock over ${transport}`, async (stage) => {
      await stage.events({ transport, major: eventsMajor, events: [{ id: EVENT, categories: [{ id: GOLD, total: TOTAL }] }] });
      // Redis by TCP in one half of the combinations, by its Unix socket in the other.
      const redis = await stage.redis();
      const { a, b } = await stage.fleet(transport === 'rmq' ? { SEATLOCK_REDIS_URL: redis.unixUrl } : {});
      let before = TOTAL;
      for (const [major, kind] of [[11, 'default'], [10, 'websocket']]) {
        const orders = await stage.orders(major);
        const userId = 100 + major;
        const orderId = 5000 + major;
        const buyer = await stage.client(a, userId, { name: 'buyer', transport: kind });
        const tab = await stage.client(b, userId, { name: "buyer's second tab", transport: kind });
        const watcher = await stage.client(b, 900 + major, { name: 'watcher', transport: kind });
        const joined = await watcher.join(EVENT);
        await buyer.join(EVENT);
        check.availability(joined.availability[0], { availableTickets: before, lockedTickets: 0, totalTickets: TOTAL });

        const from = watcher.mark();
        const grant = await buyer.lock(EVENT, GOLD, QUANTITY);
        check.granted(grant, { eventId: EVENT, categoryId: GOLD, quantity: QUANTITY });
        const after = before - QUANTITY;
        assert.equal(grant.availableTickets, after);
        const down = await watcher.update(GOLD, (u) => u.availableTickets === after, { from, what: 'down at the lock' });
        check.availability(down, { lockedTickets: QUANTITY, totalTickets: TOTAL, status: 'available' });
        const told = await watcher.next('tickets-locked-by-other-user', { from });
        assert.deepEqual(told, { eventId: EVENT, categoryId: GOLD, quantity: QUANTITY });
        const locked = watcher.history.findIndex((entry) => entry.data === down);

        const order = { orderId, userId, eventId: EVENT, categoryId: GOLD, quantity: QUANTITY };
        const sale = await orders.call(flow, flow === 'create-order' ? order : { ...order, lockId: grant.lockId });
        assert.equal(sale.lockId, grant.lockId);
        for (const socket of [buyer, tab]) {
          const { message, ...rest } = await socket.next('order-completed', { where: (data) => data.orderId === orderId });
          assert.equal(typeof message, 'string');
          assert.deepEqual(rest, { orderId, eventId: EVENT, categoryId: GOLD, quantity: QUANTITY });
        }
        await watcher.update(GOLD, (u) => u.lockedTickets === 0, { from: locked, what: 'the sale settled' });
        await stage.agree(EVENT, GOLD, {
          availableTickets: after, lockedTickets: 0, totalTickets: TOTAL, status: 'available',
        });

        const updates = watcher.all('availability-update', { from: locked });
        assert.ok(
          updates.every((u) => u.availableTickets <= after && u.totalTickets === TOTAL),
          `sold tickets came back for a moment: ${JSON.stringify(updates)}`,
        );
        check.ordered(watcher, GOLD);
        assert.deepEqual(watcher.all('tickets-released-by-other-user'), []);
        assert.deepEqual(buyer.all('tickets-locked-by-other-user'), [], 'the author is not told of his own lock');
        assert.deepEqual(watcher.all('order-completed'), []);

        const record = await orders.send('get-lock', { lockId: grant.lockId });
        check.lock(record, { status: 'confirmed', userId, quantity: QUANTITY });
        assert.equal(await orders.send('confirm-ticket-lock', { lockId: grant.lockId }), true, 'a repeat is harmless');
        assert.equal(await orders.send('release-ticket-lock', { lockId: grant.lockId }), false, 'a settled sale stays');
        before = after;
        watcher.close();
      }
    });
  }
}

for (const flow of ['create-order', 'create-order-with-lock']) {
  scenario(`order: ${flow} refused by the events-service gives the tickets back and tells the buyer`, async (stage) => {
    const stock = await stage.events({ events: [{ id: EVENT, categories: [{ id: GOLD, total: TOTAL }] }] });
    const { a, b } = await stage.fleet();
    await stock.call('reservations', { open: false });
    for (const major of [11, 10]) {
      const orders = await stage.orders(major);
      const userId = 100 + major;
      const orderId = 6000 + major;
      const buyer = await stage.client(a, userId, { name: 'buyer' });
      const watcher = await stage.client(b, 900 + major, { name: 'watcher' });
      await watcher.join(EVENT);
      const from = watcher.mark();
      const grant = await buyer.lock(EVENT, GOLD, QUANTITY);
      check.granted(grant, { eventId: EVENT, categoryId: GOLD, quantity: QUANTITY });
      await watcher.update(GOLD, (u) => u.availableTickets === TOTAL - QUANTITY, { from });

      const order = { orderId, userId, eventId: EVENT, categoryId: GOLD, quantity: QUANTITY };
      const refusal = await check.failure(
        orders.call(flow, flow === 'create-order' ? order : { ...order, lockId: grant.lockId }),
      );
      assert.equal(refusal.message, 'Reservations are suspended');
      const { message, ...rest } = await buyer.next('order-cancelled');
      assert.equal(typeof message, 'string');
      assert.deepEqual(rest, { orderId, eventId: EVENT, categoryId: GOLD, quantity: QUANTITY });
      const gone = await buyer.next('lock-released');
      assert.deepEqual(
        { lockId: gone.lockId, eventId: gone.eventId, categoryId: gone.categoryId, quantity: gone.quantity },
        { lockId: grant.lockId, eventId: EVENT, categoryId: GOLD, quantity: QUANTITY },
      );
      const back = await watcher.next('tickets-released-by-other-user', { from });
      assert.equal(back.quantity, QUANTITY);
      assert.ok(['released', 'cancelled'].includes(back.reason), JSON.stringify(back));
      await watcher.update(GOLD, (u) => u.availableTickets === TOTAL && u.lockedTickets === 0, { from });
      await stage.agree(EVENT, GOLD, { availableTickets: TOTAL, lockedTickets: 0, totalTickets: TOTAL });
      check.ordered(watcher, GOLD);
      check.lock(await orders.send('get-lock', { lockId: grant.lockId }), { status: 'released' });
      assert.equal(await orders.send('confirm-ticket-lock', { lockId: grant.lockId }), false);
    }
  });
}

scenario('order: a buyer who was between two connections is told of the sale, on each socket once', async (stage) => {
  await stage.events({ events: [{ id: EVENT, categories: [{ id: GOLD, total: TOTAL }] }] });
  const { a, b } = await stage.fleet();
  const orders = await stage.orders(11);
  const report = { orderId: 7001, userId: 7, eventId: EVENT, categoryId: GOLD, quantity: QUANTITY };
  const buyer = await stage.client(a, 7, { name: 'buyer', reconnect: true });
  const grant = await buyer.lock(EVENT, GOLD, QUANTITY);
  assert.equal(await orders.send('confirm-ticket-lock', { lockId: grant.lockId, orderId: 7001 }), true);

  // Away for a second at least.
  buyer.socket.io.reconnectionDelayMax(2000);
  buyer.socket.io.reconnectionDelay(2000);
  const from = buyer.mark();
  buyer.socket.io.engine.close();
  await buyer.next('(disconnect)', { from });
  assert.equal(await orders.send('order-completed', report), true);
  assert.deepEqual(buyer.all('connected', { from }), [], 'still away');
  await buyer.next('connected', { from });
  assert.equal((await buyer.next('order-completed', { from })).orderId, 7001);

  // A second report is none to a socket that has heard the first; what comes after it shows that it went by.
  assert.equal(await orders.send('order-completed', report), true);
  assert.equal(await orders.send('order-completed', { ...report, orderId: 7002 }), true);
  await buyer.next('order-completed', { from, where: ({ orderId }) => orderId === 7002 });
  assert.deepEqual(buyer.all('order-completed', { from }).map(({ orderId }) => orderId), [7001, 7002]);

  // Another device, elsewhere, a moment later: as far as is known the first one may have vanished.
  const phone = await stage.client(b, 7, { name: 'telephone' });
  await phone.next('order-completed', { where: ({ orderId }) => orderId === 7002 });
  assert.deepEqual(phone.all('order-completed').map(({ orderId }) => orderId), [7001, 7002]);
});
