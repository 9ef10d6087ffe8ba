'use strict';
// Claim: an unmodified socket.io-client gets what the contract's section 1 promises: who may come in, every request
// answered once, as a message or as an acknowledgement, and nonsense answered without losing the connection.
// Provoked by: every request of the table, in both forms, over polling, WebSocket and the default upgrade.

const assert = require('node:assert/strict');
const check = require('../lib/check.js');
const { ANSWER, Client } = require('../lib/client.js');
const { scenario } = require('../lib/scenario.js');
const { token } = require('../lib/token.js');
const { until } = require('../lib/wait.js');

const EVENT = 1;
const GOLD = 1;
const SILVER = 2;
const EVENTS = [
  { id: EVENT, categories: [{ id: GOLD, total: 100 }, { id: SILVER, total: 4 }] },
  { id: 3, categories: [{ id: 4, total: 10, isActive: false }, { id: 5, total: 10 }] },
];

scenario('socket: who may come in, and what the others are told', async (stage) => {
  await stage.events({ events: EVENTS });
  const { a } = await stage.fleet();
  for (const transport of ['default', 'websocket', 'polling']) {
    const enter = async (user, options) => {
      const client = await stage.client(a, user, { transport, ...options });
      const { sessionId, serverTime, message, locks, success, userId } = client.greeting;
      assert.equal(success, true);
      assert.equal(userId, user);
      assert.ok(typeof sessionId === 'string' && sessionId.length > 0);
      assert.equal(typeof message, 'string');
      assert.match(serverTime, check.ISO);
      assert.deepEqual(locks, []);
      client.close();
    };
    const refused = (user, options) => Client.refused(a, user, { transport, ...options });

    await enter(1, {});
    await enter(2, { query: { userId: '2' } });
    await enter(3, { token: null, query: { token: token(3) } });
    await enter(4, { token: null, extraHeaders: { Authorization: `Bearer ${token(4)}` } });
    await enter(5, { token: token(5, { claims: { sub: undefined, userId: 5 } }) });

    assert.equal(await refused(1, { token: null }), 'unauthorized');
    assert.equal(await refused(1, { token: 'nonsense' }), 'unauthorized');
    assert.equal(await refused(1, { token: '' }), 'unauthorized');
    assert.equal(await refused(1, { token: token(1, { secret: 'another secret of more than 32 bytes, a forgery' }) }), 'unauthorized');
    const unsigned = `${Buffer.from('{"alg":"none","typ":"JWT"}').toString('base64url')}.${token(1).split('.')[1]}.`;
    assert.equal(await refused(1, { token: unsigned }), 'unauthorized');
    assert.equal(await refused(1, { token: token(1, { claims: { sub: 'nobody' } }) }), 'unauthorized');
    assert.equal(await refused(1, { token: token(1, { claims: { sub: '-1' } }) }), 'unauthorized');
    assert.equal(await refused(1, { token: token(1, { expiresIn: -3600 }) }), 'token_expired');
    assert.equal(await refused(1, { query: { userId: '2' } }), 'user_mismatch');
  }
});

scenario('socket: a token that runs out is announced, and a new one keeps the connection', async (stage) => {
  await stage.events({ events: EVENTS });
  const { a } = await stage.fleet({ SEATLOCK_TOKEN_GRACE: '2s' });
  const short = (user) => token(user, { expiresIn: 3 });
  const careless = await stage.client(a, 1, { name: 'careless', token: short(1) });
  const careful = await stage.client(a, 2, { name: 'careful', token: short(2) });
  const stubborn = await stage.client(a, 3, { name: 'stubborn', token: short(3), transport: 'websocket' });

  const renewed = await careful.ask('refresh-token', { token: token(2) });
  assert.equal(renewed.success, true, JSON.stringify(renewed));
  assert.ok(Date.parse(renewed.expiresAt) > Date.now() + 3_000_000, JSON.stringify(renewed));
  assert.equal((await stubborn.ask('refresh-token', { token: 'nonsense' })).success, false);
  assert.equal((await stubborn.tell('refresh-token', { token: token(4) })).success, false, "another user's token");

  for (const client of [careless, stubborn]) {
    // A token is good for a few seconds after its expiry: clocks differ.
    const warning = await client.next('error', { within: 12_000 });
    assert.equal(warning.code, 'token_expired');
    const { reason } = await client.next('(disconnect)', { within: 8000 });
    assert.equal(reason, 'transport close', 'a client comes back by itself only after that');
  }
  assert.ok(careful.socket.connected);
  assert.deepEqual(careful.all('error'), []);
  assert.match((await careful.ask('heartbeat')).timestamp, check.ISO);
});

for (const transport of ['default', 'websocket', 'polling']) {
  for (const form of ['acknowledged', 'answered by name']) {
    scenario(`socket: every request, ${form} (${transport})`, async (stage) => {
      await stage.events({ events: EVENTS });
      const { a, b } = await stage.fleet();
      const client = await stage.client(a, 7, { name: 'client', transport });
      const tab = await stage.client(b, 7, { name: 'second tab', transport });
      let asked = 0;
      const ask = (name, data) => {
        asked++;
        return form === 'acknowledged' ? client.ask(name, data) : client.tell(name, data);
      };

      const joined = await ask('join-event-room', { eventId: EVENT, userId: 7 });
      assert.equal(joined.success, true, JSON.stringify(joined));
      assert.equal(joined.eventId, EVENT);
      assert.equal(typeof joined.message, 'string');
      assert.deepEqual(joined.locks, []);
      assert.deepEqual(joined.availability.map(({ categoryId }) => categoryId), [GOLD, SILVER]);
      check.availability(joined.availability[1], { eventId: EVENT, availableTickets: 4, lockedTickets: 0, totalTickets: 4 });
      for (const categoryId of [GOLD, SILVER]) check.availability(await client.update(categoryId, () => true), { eventId: EVENT });

      const wanted = { eventId: EVENT, categoryId: GOLD, quantity: 2 };
      const grant = await ask('lock-tickets', { ...wanted, userId: 7, requestId: 'first' });
      check.granted(grant, wanted);
      assert.equal(grant.requestId, 'first');
      assert.equal(grant.availableTickets, 98);
      const repeat = await ask('lock-tickets', { ...wanted, requestId: 'first' });
      check.granted(repeat, wanted);
      assert.equal(repeat.lockId, grant.lockId, 'the same request has the same lock');
      const second = await ask('lock-tickets', { ...wanted, requestId: 'second' });
      check.refused(second, 'already_locked', 'You already have tickets locked for this category');
      assert.equal(second.requestId, 'second');
      assert.deepEqual([second.eventId, second.categoryId], [EVENT, GOLD]);

      const few = await ask('lock-tickets', { eventId: EVENT, categoryId: SILVER, quantity: 5 });
      check.refused(few, 'insufficient_tickets', 'Only 4 tickets available');
      assert.equal(few.availableTickets, 4);
      check.refused(await ask('lock-tickets', { eventId: EVENT, categoryId: 77, quantity: 1 }), 'category_not_found', 'Ticket category not found');
      check.refused(await ask('lock-tickets', { eventId: 999, categoryId: 1, quantity: 1 }), 'event_not_found');
      check.refused(await ask('lock-tickets', { eventId: 3, categoryId: 4, quantity: 1 }), 'event_closed');
      check.refused(await ask('join-event-room', { eventId: 999 }), 'event_not_found');

      const mine = (await ask('get-my-locks')).locks;
      assert.equal(mine.length, 1);
      check.lock(mine[0], { ...wanted, lockId: grant.lockId, userId: 7, status: 'active', expiresAt: grant.expiresAt });
      assert.deepEqual((await tab.ask('get-my-locks')).locks.map(({ lockId }) => lockId), [grant.lockId]);
      assert.match((await ask('heartbeat')).timestamp, check.ISO);

      const unlocked = await ask('unlock-tickets', { eventId: EVENT, categoryId: GOLD, quantity: 1 });
      assert.equal(unlocked.success, true, JSON.stringify(unlocked));
      assert.equal(unlocked.message, 'Tickets unlocked successfully');
      assert.equal(unlocked.lockId, grant.lockId);
      const told = await tab.next('lock-released');
      assert.deepEqual(told, { lockId: grant.lockId, ...wanted, reason: 'released' });
      check.refused(await ask('unlock-tickets', { eventId: EVENT, categoryId: GOLD }), 'lock_not_found', 'No tickets found to unlock');

      const next = await ask('lock-tickets', wanted);
      check.granted(next, wanted);
      assert.notEqual(next.lockId, grant.lockId);
      const byId = await ask('unlock-tickets', { lockId: next.lockId });
      assert.equal(byId.success, true, JSON.stringify(byId));
      assert.equal(byId.lockId, next.lockId);
      check.refused(await ask('unlock-tickets', { lockId: 'not-a-lock' }), 'lock_not_found');

      const left = await ask('leave-event-room', { eventId: EVENT });
      assert.deepEqual([left.success, left.eventId, typeof left.message], [true, EVENT, 'string'], JSON.stringify(left));

      // One request, one answer: an acknowledged request has no message of its own beside it, and no answer came twice.
      await ask('heartbeat');
      const named = Object.values(ANSWER).flatMap((name) => client.all(name));
      if (form === 'acknowledged') assert.deepEqual(named, []);
      else assert.equal(named.length, asked);
      assert.deepEqual(client.all('lock-released'), [], 'the socket that asked has its answer');
      assert.deepEqual(client.all('error'), []);
    });
  }
}

scenario('socket: nonsense is answered and the connection survives', async (stage) => {
  await stage.events({ events: EVENTS });
  const { a } = await stage.fleet({ SEATLOCK_RATE_LIMIT: 'off' });
  let deep = {};
  for (let i = 0; i < 100; i++) deep = { deep };
  const ids = [0, -1, 1.5, 2 ** 53, '1', null, [], {}, true];
  for (const transport of ['websocket', 'polling']) {
    const client = await stage.client(a, 7, { name: 'client', transport });
    const bad = [
      ...['text', 5, null, [], {}, deep, [1, 2]].flatMap((data) =>
        ['lock-tickets', 'join-event-room', 'leave-event-room', 'unlock-tickets'].map((name) => [name, data])),
      ...ids.map((eventId) => ['join-event-room', { eventId }]),
      ...ids.map((eventId) => ['lock-tickets', { eventId, categoryId: GOLD, quantity: 1 }]),
      ...ids.map((categoryId) => ['lock-tickets', { eventId: EVENT, categoryId, quantity: 1 }]),
      ...[0, -1, 1.5, '2', null].map((quantity) => ['lock-tickets', { eventId: EVENT, categoryId: GOLD, quantity }]),
      ['lock-tickets', { eventId: EVENT, categoryId: GOLD }],
      ['lock-tickets', { eventId: EVENT, categoryId: GOLD, quantity: 1, requestId: 'x'.repeat(5000) }],
    ];
    for (const [name, data] of bad) {
      const answer = await client.ask(name, data);
      check.refused(answer, 'invalid_request');
    }
    check.refused(await client.lock(EVENT, GOLD, 11), 'limit_exceeded');
    assert.equal((await client.lock(EVENT, GOLD, 1e300)).success, false);
    for (const [name, data] of bad.slice(0, 12)) check.refused(await client.tell(name, data), 'invalid_request');
    // No argument at all.
    check.refused(await client.ask('lock-tickets'), 'invalid_request');
    check.refused(await client.tell('join-event-room'), 'invalid_request');

    client.socket.emit('no-such-message', { eventId: EVENT });
    const unknown = await client.next('error');
    assert.equal(typeof unknown.message, 'string');
    assert.equal(unknown.code, 'invalid_request');
    // Extra fields and extra arguments are ignored.
    const grant = await client.lock(EVENT, GOLD, 1, { colour: 'blue', nested: deep });
    check.granted(grant, { eventId: EVENT, categoryId: GOLD, quantity: 1 });
    assert.equal((await client.ask('unlock-tickets', { lockId: grant.lockId })).success, true);
    assert.deepEqual(client.all('(disconnect)'), []);
    client.close();
  }
});

scenario("socket: the token says who asks, not the payload; a stranger's lock is out of reach", async (stage) => {
  await stage.events({ events: EVENTS });
  const { a, b } = await stage.fleet();
  const thief = await stage.client(a, 7, { name: 'thief' });
  const owner = await stage.client(b, 8, { name: 'owner' });
  const claimed = await thief.lock(EVENT, GOLD, 1, { userId: 8 });
  if (claimed.success) assert.equal((await thief.ask('get-my-locks')).locks[0].userId, 7);
  else check.refused(claimed, 'unauthorized', 'Unauthorized');
  assert.deepEqual((await owner.ask('get-my-locks')).locks, []);

  const grant = await owner.lock(EVENT, SILVER, 2);
  assert.equal(grant.success, true);
  check.refused(await thief.ask('unlock-tickets', { lockId: grant.lockId }), 'lock_not_found', 'No tickets found to unlock');
  const again = await thief.ask('unlock-tickets', { eventId: EVENT, categoryId: SILVER, userId: 8 });
  assert.equal(again.success, false, JSON.stringify(again));
  assert.equal((await owner.ask('get-my-locks')).locks.length, 1);
  assert.ok(!JSON.stringify(thief.history).includes(grant.lockId), 'nobody else learns a lock id');
});

scenario('socket: limits per lock, per event and per second are refusals with their own codes', async (stage) => {
  await stage.events({ events: EVENTS });
  const { a } = await stage.fleet({ SEATLOCK_MAX_PER_LOCK: '4', SEATLOCK_MAX_PER_EVENT: '5', SEATLOCK_RATE_LIMIT: '1/s burst 6' });
  const client = await stage.client(a, 7);
  check.refused(await client.lock(EVENT, GOLD, 5), 'limit_exceeded');
  check.granted(await client.lock(EVENT, GOLD, 4), { eventId: EVENT, categoryId: GOLD, quantity: 4 });
  check.refused(await client.lock(EVENT, SILVER, 2), 'limit_exceeded');
  check.granted(await client.lock(EVENT, SILVER, 1), { eventId: EVENT, categoryId: SILVER, quantity: 1 });
  const limited = await until(5000, 'the rate limit', async () => {
    const answer = await client.lock(EVENT, GOLD, 1);
    return answer.code === 'rate_limited' ? answer : undefined;
  }, 1);
  assert.ok(limited.retryAfterMs > 0 && limited.retryAfterMs <= 1100, JSON.stringify(limited));
});

scenario('http: the pages of the contract, over the whole fleet', async (stage) => {
  await stage.events({ events: EVENTS });
  const { a, b } = await stage.fleet();
  const one = await stage.client(a, 1);
  await stage.client(b, 2);
  await one.lock(EVENT, GOLD, 3);
  const root = (await a.http('/')).json;
  assert.deepEqual({ service: root.service, status: root.status }, { service: 'realtime-service', status: 'active' });
  assert.equal(typeof root.version, 'string');
  for (const replica of [a, b]) {
    assert.equal((await replica.http('/livez')).status, 200);
    assert.equal((await replica.http('/readyz')).status, 200);
    const page = await replica.availability(EVENT);
    check.availability(page[0], { eventId: EVENT, categoryId: GOLD, availableTickets: 97, lockedTickets: 3, totalTickets: 100 });
    assert.equal((await replica.http('/events/999/availability')).status, 404);
    assert.equal((await replica.http('/events/x/availability')).status, 400);
    assert.equal((await replica.http('/nothing')).status, 404);
    assert.equal((await replica.http('/demo/')).status, 404, 'the demo is off');
    const metrics = (await replica.http('/metrics')).text;
    assert.match(metrics, /^seatlock_ledger_call_seconds_count/m);
    if (replica === a) assert.match(metrics, /^seatlock_ledger_locks_total\{outcome="granted"\} 1$/m);
    assert.doesNotMatch(metrics, new RegExp(check.UUID.source.slice(1, -1), 'm'));
    const stats = await until(5000, 'the counts of both replicas', async () => {
      const { json } = await replica.http('/stats');
      if (json.connectedUsers !== 2) throw new Error(JSON.stringify(json));
      return json;
    });
    assert.equal(stats.service, 'realtime-service');
    assert.equal(stats.ticketLocks.activeLocks, 1);
    assert.equal(stats.ticketLocks.totalLocks, 1);
    assert.equal(stats.ticketLocks.usersWithLocks, 1);
    assert.equal(stats.ticketLocks.categoriesWithLocks, 1);
    assert.deepEqual(stats.ticketLocks.locksByStatus, { active: 1, expired: 0, confirmed: 0, released: 0 });
    assert.equal(stats.replicas?.length ?? stats.replicas, 2);
  }
});
