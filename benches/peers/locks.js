// Locks over socket.io and ioredis with the scripts of lua/, asked for as the service asks: both indexes, then the lock.

'use strict';

const crypto = require('node:crypto');
const fs = require('node:fs');
const path = require('node:path');
const Redis = require('ioredis');
const { serve } = require('./common');

const LUA = path.join(__dirname, '..', '..', 'lua');
const text = (name) => fs.readFileSync(path.join(LUA, `${name}.lua`), 'utf8');
const redis = new Redis(Number(process.env.REDIS_PORT), '127.0.0.1', {
  enableAutoPipelining: process.env.AUTO_PIPELINING === 'yes',
});

// The prelude's parts but for functions that nobody behind them calls, as src/ledger/script.rs joins them.
function joined(name) {
  return text('_prelude').trimEnd().split('\n\n').reduceRight((behind, part) => {
    const made = /^local function (\w+)/m.exec(part);
    return !made || new RegExp(`\\b${made[1]}\\(`).test(behind) ? `${part}\n\n${behind}` : behind;
  }, text(name));
}

redis.defineCommand('touch_', { numberOfKeys: 2, lua: text('touch') });
redis.defineCommand('visit_', { numberOfKeys: 1, lua: text('visit') });
redis.defineCommand('lock_', { numberOfKeys: 5, lua: joined('lock') });
redis.defineCommand('release_', { numberOfKeys: 5, lua: joined('release') });

const TTL_MS = 300_000;
const DAY_MS = 86_400_000;
const LIMITS = [TTL_MS, DAY_MS, process.env.PER_EVENT_MAX, process.env.INTERVAL_US, process.env.BURST_US].join(' ');

const keysOf = (event, ...more) =>
  ['book', 'deadlines', 'ended', ...more].map((name) => `seatlock:3:{e:${event}}:${name}`);

// A version 8 UUID with the event in 53 of its bits, as the service makes them.
function lockId(event) {
  const random = BigInt(`0x${crypto.randomBytes(16).toString('hex')}`) & ((0x7fn << 64n) | ((1n << 62n) - 1n));
  const id = BigInt(event);
  const bits = ((id >> 5n) << 80n) | (0x8n << 76n) | ((id & 0x1fn) << 71n) | (0b10n << 62n) | random;
  const hex = bits.toString(16).padStart(32, '0');
  return [hex.slice(0, 8), hex.slice(8, 12), hex.slice(12, 16), hex.slice(16, 20), hex.slice(20)].join('-');
}

function eventOf(lock) {
  const bits = BigInt(`0x${lock.replaceAll('-', '')}`);
  return Number(((bits >> 80n) << 5n) | ((bits >> 71n) & 0x1fn));
}

// What was written into an index within ten seconds is not written again, as the service does it.
const RECENT_MS = 10_000;
const recent = new Map();

function unlessRecent(key, write) {
  const now = Date.now();
  if (now - (recent.get(key) ?? 0) < RECENT_MS) return undefined;
  recent.set(key, now);
  return write();
}

async function lock(user, session, { eventId, categoryId, quantity }) {
  const id = lockId(eventId);
  const [, , said] = await Promise.all([
    unlessRecent(eventId, () =>
      redis.touch_('seatlock:{fleet}:due', 'seatlock:{fleet}:events', eventId, TTL_MS - 60_000)),
    unlessRecent(`${user} ${eventId}`, () => redis.visit_(`seatlock:{u:${user}}`, eventId)),
    redis.lock_(...keysOf(eventId, `lock:${id}`, `rate:${user}`), id, user, categoryId, quantity, session, 1, LIMITS,
      process.env.BURST_MS),
  ]);
  const [word, ...numbers] = said.split(' ');
  if (word !== 'granted') return { success: false, code: word, message: word, eventId, categoryId };
  const [deadline, stock, , , active, settling, , now] = numbers.map(Number);
  return {
    success: true,
    lockId: id,
    expiresAt: new Date(deadline).toISOString(),
    availableTickets: stock - active - settling,
    eventId,
    categoryId,
    quantity,
    serverTime: new Date(now).toISOString(),
  };
}

async function unlock(user, session, { lockId: id }) {
  const event = eventOf(id);
  const said = await redis.release_(...keysOf(event, 'settling', `lock:${id}`), id, 'owner', user, session);
  if (!said.startsWith('released ')) return { success: false, code: 'lock_not_found', message: 'No tickets found to unlock' };
  return { success: true, message: 'Tickets unlocked successfully', lockId: id };
}

serve((socket) => {
  const session = crypto.randomBytes(16).toString('hex');
  const refused = (error) => ({ success: false, code: 'unavailable', message: error.message });
  socket.on('lock-tickets', (data, answer) => lock(socket.data.user, session, data).catch(refused).then(answer));
  socket.on('unlock-tickets', (data, answer) => unlock(socket.data.user, session, data).catch(refused).then(answer));
});
