'use strict';
// Claim: unchanged NestJS callers, 10 and 11, get what the contract's section 2 promises, and neither they nor strangers
// can bring the queue to a stop; the stock comes from whichever events-service runs.
// Provoked by: every pattern from both majors, bodies that no service can read, a deleted queue, absent peers.

const assert = require('node:assert/strict');
const check = require('../lib/check.js');
const { Peer } = require('../lib/peer.js');
const { scenario } = require('../lib/scenario.js');
const { until } = require('../lib/wait.js');

const EVENT = 1;
const GOLD = 1;
const SILVER = 2;
const EVENTS = [{ id: EVENT, categories: [{ id: GOLD, total: 100 }, { id: SILVER, total: 4 }] }];
const NO_HANDLER = 'There is no matching message handler defined in the remote service.';
const NO_LOCK = 'No valid locks found for the requested tickets';

for (const major of [11, 10]) {
  scenario(`rpc: every pattern from Nest ${major}`, async (stage) => {
    await stage.events({ events: EVENTS });
    const { a } = await stage.fleet();
    const orders = await stage.orders(major);
    const user = await stage.client(a, 7, { name: 'buyer' });
    const grant = await user.lock(EVENT, GOLD, 2);
    assert.equal(grant.success, true, JSON.stringify(grant));
    const { lockId } = grant;
    const wanted = { userId: 7, eventId: EVENT, categoryId: GOLD, quantity: 2 };

    assert.equal(await check.failure(orders.send('no-such-pattern', {})), NO_HANDLER);
    assert.equal(await check.failure(orders.send({ cmd: 'confirm-lock' }, {})), NO_HANDLER);

    const none = await orders.send('validate-user-locks', { ...wanted, userId: 8 });
    assert.equal(none.valid, false);
    assert.equal(none.message, NO_LOCK);
    assert.equal(typeof none.code, 'string');
    assert.equal((await orders.send('validate-user-locks', { ...wanted, quantity: 3 })).message, NO_LOCK);
    assert.equal((await orders.send('validate-user-locks', { ...wanted, categoryId: SILVER })).message, NO_LOCK);
    const valid = await orders.send('validate-user-locks', wanted);
    assert.equal(valid.valid, true);
    assert.equal(valid.lockId, lockId);
    assert.match(valid.expiresAt, check.ISO);
    assert.equal((await orders.send('validate-user-locks', wanted)).lockId, lockId, 'a repeat says the same');

    const mine = await orders.send('get-user-locks', { userId: 7 });
    assert.equal(mine.length, 1);
    check.lock(mine[0], { ...wanted, lockId, status: 'active' });
    assert.deepEqual(await orders.send('get-user-locks', { userId: 8 }), []);
    const record = await orders.send('get-lock', { lockId });
    check.lock(record, { ...wanted, lockId, status: 'active' });
    assert.ok(Number.isSafeInteger(record.version));
    const stranger = `${lockId.slice(0, -8)}${lockId.endsWith('00000000') ? '11111111' : '00000000'}`;
    assert.equal(await orders.send('get-lock', { lockId: stranger }), null);

    assert.equal(await orders.send('confirm-lock', { lockId, userId: 8 }), false, "another user's");
    assert.equal(await orders.send('confirm-ticket-lock', { lockId: stranger }), false, 'unknown');
    assert.equal(await orders.send('release-ticket-lock', { lockId: stranger }), false);
    assert.equal(await orders.send('release-ticket-lock', { lockId, userId: 8 }), false, "another user's");
    assert.equal(await orders.send('confirm-lock', { lockId, userId: 7, orderId: 41 }), true);
    assert.equal(await orders.send('confirm-lock', { lockId, userId: 7, orderId: 41 }), true, 'a repeat');
    assert.equal(await orders.send('confirm-ticket-lock', { lockId }), true, 'a repeat by the other name');
    assert.equal(await orders.send('release-ticket-lock', { lockId }), true, 'the order failed before it was reported');
    assert.equal(await orders.send('confirm-ticket-lock', { lockId }), false);
    check.lock(await orders.send('get-lock', { lockId }), { status: 'released' });

    const other = await user.lock(EVENT, GOLD, 1);
    assert.equal(await orders.send('release-ticket-lock', { lockId: other.lockId, userId: 7 }), true, 'an active one');
    const gone = await user.next('lock-released', { where: (data) => data.lockId === other.lockId });
    assert.equal(gone.quantity, 1);

    // As requests, which an older orders-service makes of what newer ones emit.
    const order = { orderId: 41, eventId: EVENT, categoryId: GOLD, quantity: 2, userId: 7 };
    assert.equal(await orders.send('order-cancelled', order), true);
    await user.next('order-cancelled', { where: ({ orderId }) => orderId === 41 });
    assert.equal(await orders.send('order-completed', { ...order, orderId: 'order-42' }), true);
    const completed = await user.next('order-completed');
    assert.equal(completed.orderId, 'order-42', 'an order id keeps its type');
    await orders.emit('availability-changed', { eventId: EVENT });

    const stats = await orders.send('get-realtime-stats', {});
    assert.equal(stats.service, 'realtime-service');
    for (const key of ['totalLocks', 'activeLocks', 'usersWithLocks', 'categoriesWithLocks']) {
      assert.equal(typeof stats.ticketLocks[key], 'number', JSON.stringify(stats));
    }
    const page = (await a.http('/stats')).json;
    assert.deepEqual(Object.keys(stats).sort(), Object.keys(page).sort(), 'what /stats returns');

    for (const [pattern, data] of [
      ['validate-user-locks', 'nonsense'], ['validate-user-locks', { userId: 7 }], ['validate-user-locks', { ...wanted, quantity: -1 }],
      ['confirm-ticket-lock', {}], ['confirm-lock', { lockId }], ['release-ticket-lock', [1]],
      ['get-user-locks', {}], ['get-lock', 5], ['order-completed', { orderId: 1 }],
    ]) {
      const err = await check.failure(orders.send(pattern, data));
      assert.equal(err.status, 'error', `${pattern} ${JSON.stringify(data)}: ${JSON.stringify(err)}`);
      assert.equal(typeof err.message, 'string');
    }
    assert.equal(await orders.send('confirm-ticket-lock', { lockId: 'not-a-lock' }), false, 'an unknown lock, however it is spelt');
  });
}

scenario('rpc: the stock follows availability-changed and cancelled orders at once', async (stage) => {
  const stock = await stage.events({ transport: 'rmq', major: 10, events: EVENTS });
  const { a, b } = await stage.fleet({ SEATLOCK_STOCK_REFRESH: '60s' });
  const orders = await stage.orders(11);
  const watcher = await stage.client(b, 9, { name: 'watcher' });
  await watcher.join(EVENT);
  await orders.call('ask-events', { pattern: 'reserve-tickets', data: { eventId: EVENT, categoryId: SILVER, quantity: 3 } });
  await orders.emit('availability-changed', { eventId: EVENT });
  check.availability(await watcher.update(SILVER, (u) => u.availableTickets === 1), { totalTickets: 4 });
  await stock.call('put', { id: EVENT, categories: [{ id: GOLD, total: 100 }, { id: SILVER, total: 9, reserved: 3 }] });
  await orders.emit('availability-changed', { eventId: EVENT });
  check.availability(await watcher.update(SILVER, (u) => u.totalTickets === 9), { availableTickets: 6 });

  const buyer = await stage.client(a, 7, { name: 'buyer' });
  const grant = await buyer.lock(EVENT, SILVER, 2);
  const order = { orderId: 1, userId: 7, eventId: EVENT, categoryId: SILVER, quantity: 2, lockId: grant.lockId };
  await orders.call('create-order-with-lock', order);
  await stage.agree(EVENT, SILVER, { availableTickets: 4, lockedTickets: 0 });
  await orders.call('ask-events', { pattern: 'release-tickets', data: { eventId: EVENT, categoryId: SILVER, quantity: 2 } });
  await orders.emit('order-cancelled', order);
  await buyer.next('order-cancelled');
  await stage.agree(EVENT, SILVER, { availableTickets: 6, lockedTickets: 0 });
  check.ordered(watcher, SILVER);
});

scenario('rpc: what no service can read is survived, and does not come round again', async (stage) => {
  await stage.events({ events: EVENTS });
  const { a } = await stage.fleet();
  const wire = await stage.wire();
  const orders = await stage.orders(11);
  const buyer = await stage.client(a, 7);
  const { lockId } = await buyer.lock(EVENT, GOLD, 1);
  await until(10_000, 'both replicas consume', async () => (await wire.look(stage.queue))?.consumerCount === 2);
  const deep = `{"pattern":"get-lock","data":${'['.repeat(20_000)}${']'.repeat(20_000)},"id":"x"}`;
  const poison = [
    '', 'null', '5', '"echo"', '[1,2]', '{', '{"pattern":"confirm-lock",', '{"foo":1}', '{"foo":1,"id":"i"}',
    '\uFEFF{"pattern":"get-lock","data":{},"id":"i"}', Buffer.from([0xff, 0xfe, 0x00, 0x7b]),
    Buffer.from('{"pattern":"get-lock","data":"\xff","id":"i"}', 'latin1'), deep, `"${'x'.repeat(3_000_000)}"`,
    '{"pattern":"order-completed","data":"nonsense"}', '{"pattern":"no-such-event","data":{}}',
    '{"pattern":null,"data":1,"id":"i"}', '{"data":1,"id":"i"}',
  ];
  for (const body of poison) {
    await wire.publish(stage.queue, body);
    await wire.publish(stage.queue, body, { replyTo: 'amq.rabbitmq.reply-to.nobody.there', correlationId: 'error' });
    await wire.publish(stage.queue, body, { replyTo: 'no-such-queue' });
  }
  assert.equal(await orders.send('confirm-ticket-lock', { lockId }), true);
  await until(10_000, 'the queue is empty and both replicas consume it', async () => {
    const seen = await wire.look(stage.queue);
    if (seen.messageCount !== 0 || seen.consumerCount !== 2) throw new Error(JSON.stringify(seen));
    return true;
  });
  // Not requeued, not held back unacknowledged: nothing is left in the queue when its consumers are gone.
  await stage.seatlock.stop();
  assert.equal((await wire.look(stage.queue)).messageCount, 0);
});

scenario('rpc: the bytes of replies are those of a Nest server', async (stage) => {
  await stage.events({ events: EVENTS });
  const { a } = await stage.fleet();
  const wire = await stage.wire();
  const buyer = await stage.client(a, 7);
  const { lockId } = await buyer.lock(EVENT, GOLD, 1);
  // A replica is ready for browsers before its consumer stands, and a message to no queue is lost.
  await until(10_000, 'both replicas consume', async () => (await wire.look(stage.queue))?.consumerCount === 2);
  const exact = [
    ['{"pattern":"no-such-pattern","data":{},"id":"id-1"}', `{"id":"id-1","err":"${NO_HANDLER}","status":"error"}`],
    ['{"data":1,"id":"i"}', `{"id":"i","err":"${NO_HANDLER}","status":"error"}`],
    ['{"pattern":null,"data":1,"id":"i"}', `{"id":"i","err":"${NO_HANDLER}","status":"error"}`],
    ['{ "id": "i",\n "data": {"lockId":"00000000-0000-8000-8000-000000000000"}, "pattern": "get-lock" }', '{"response":null,"isDisposed":true}'],
    ['{"pattern":"get-user-locks","data":{"userId":99},"id":null}', '{"response":[],"isDisposed":true}'],
    [`{"pattern":"confirm-ticket-lock","data":{"lockId":"${lockId}"},"id":"other-id","x":1}`, '{"response":true,"isDisposed":true}'],
    [`{"pattern":"validate-user-locks","data":{"userId":7,"eventId":1,"categoryId":1,"quantity":1},"id":""}`, undefined],
  ];
  for (const [question, wanted] of exact) {
    const { text, correlationId } = await wire.ask(stage.queue, question);
    assert.equal(correlationId, 'c-1');
    if (wanted !== undefined) assert.equal(text, wanted);
    else assert.match(text, new RegExp(`^\\{"response":\\{"valid":false,"message":"${NO_LOCK}"`));
  }
});

scenario('rpc: a Nest peer may declare the queue before Seatlock or after it', async (stage) => {
  await stage.events({ events: EVENTS });
  stage.queue = 'realtime_queue';
  const wire = await stage.wire();
  assert.equal(await wire.look(stage.queue), undefined, 'nobody has declared it yet');
  const early = [await stage.orders(11), await stage.orders(10)];
  for (const orders of early) await orders.call('connect');
  assert.ok(await wire.look(stage.queue));
  await stage.fleet();
  for (const orders of early) assert.deepEqual(await orders.send('get-user-locks', { userId: 1 }), []);

  // And the other way round: a queue that Seatlock itself has made.
  await stage.seatlock.stop();
  await Promise.all(early.map((orders) => orders.stop()));
  await wire.delete(stage.queue);
  const settings = { SEATLOCK_AMQP_QUEUE: undefined };
  await stage.fleet(settings);
  await until(5000, 'both replicas consume', async () => (await wire.look('realtime_queue'))?.consumerCount === 2);
  for (const major of [11, 10]) {
    const orders = await stage.orders(major);
    await orders.call('connect');
    assert.deepEqual(await orders.send('get-user-locks', { userId: 1 }), []);
    assert.ok(orders.process.alive, 'a 406 would have ended it');
  }
});

scenario('rpc: the queue is deleted under the consumers, and they make it again', async (stage) => {
  await stage.events({ events: EVENTS });
  await stage.fleet();
  const wire = await stage.wire();
  const orders = [await stage.orders(11), await stage.orders(10)];
  for (const caller of orders) assert.deepEqual(await caller.send('get-user-locks', { userId: 1 }), []);
  for (let round = 0; round < 2; round++) {
    await wire.delete(stage.queue);
    await until(20_000, 'both replicas consume the new queue', async () => (await wire.look(stage.queue))?.consumerCount === 2, 100);
    for (const caller of orders) assert.deepEqual(await caller.send('get-user-locks', { userId: 1 }), []);
  }
});

scenario('stock: an older events-service without get-ticket-categories is asked for the whole event', async (stage) => {
  for (const transport of ['tcp', 'rmq']) {
    const stock = await stage.events({ transport, major: 10, withoutCategories: true, events: [
      { id: EVENT, categories: [{ id: GOLD, total: 10, reserved: 4 }] },
      { id: 2, isActive: false, categories: [{ id: 3, total: 10 }] },
    ] });
    const { a } = await stage.fleet();
    const client = await stage.client(a, 7);
    check.availability((await client.join(EVENT)).availability[0], { availableTickets: 6, totalTickets: 10 });
    check.refused(await client.join(999), 'event_not_found');
    check.refused(await client.lock(2, 3, 1), 'event_closed');
    assert.ok((await stock.call('asked'))['get-event-by-id'] >= 1);
    await stage.seatlock.stop();
    await stage.store.remove();
    stage.store = undefined;
  }
});

for (const transport of ['tcp', 'rmq']) {
  scenario(`stock: the events-service over ${transport} is gone, known stock keeps selling, and it may come back`, async (stage) => {
    const stock = await stage.events({ transport, events: [...EVENTS, { id: 2, categories: [{ id: 3, total: 5 }] }] });
    const { a } = await stage.fleet();
    const client = await stage.client(a, 7);
    await client.join(EVENT);
    await stock.stop();
    check.granted(await client.lock(EVENT, GOLD, 1), { eventId: EVENT, categoryId: GOLD, quantity: 1 });
    check.refused(await client.lock(2, 3, 1), 'inventory_unavailable', 'Failed to verify ticket availability');
    const again = await Peer.start('events-service', 11, { ...stage.place, events: [{ id: 2, categories: [{ id: 3, total: 5 }] }] });
    stage.peers.push(again);
    await until(10_000, 'the stock of the other event is known', async () => (await client.lock(2, 3, 1)).success, 300);
  });
}

scenario('stock: a slow events-service is asked once for many buyers, and a silent one costs no answer', async (stage) => {
  const stock = await stage.events({ events: [{ id: EVENT, categories: [{ id: GOLD, total: 100 }] }, { id: 2, categories: [{ id: 3, total: 5 }] }] });
  const { a, b } = await stage.fleet({ SEATLOCK_REQUEST_TIMEOUT: '4s' });
  await stock.call('delay', { ms: 500 });
  const clients = await Promise.all(Array.from({ length: 30 }, (_, i) => stage.client(i % 2 ? a : b, 100 + i, { transport: 'websocket' })));
  const answers = await Promise.all(clients.map((client) => client.lock(EVENT, GOLD, 1)));
  for (const answer of answers) check.granted(answer, { eventId: EVENT, categoryId: GOLD, quantity: 1 });
  const { 'get-ticket-categories': asked } = await stock.call('asked');
  assert.ok(asked <= 4, `asked ${asked} times`);
  await stock.call('delay', { ms: 20_000 });
  const start = Date.now();
  check.refused(await clients[0].lock(2, 3, 1), 'inventory_unavailable', 'Failed to verify ticket availability');
  assert.ok(Date.now() - start < 5000, `it took ${Date.now() - start} ms`);
});
