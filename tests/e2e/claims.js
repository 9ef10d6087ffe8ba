'use strict';
// What people see and do. Two buyers and a watcher, each in a window of their own: a desktop in the light, a phone in the
// dark, a desktop in the dark.

const assert = require('node:assert/strict');
const fs = require('node:fs');
const path = require('node:path');
const { execFileSync } = require('node:child_process');
const YAML = require('yaml');
const { ROOT, freePort } = require('./lib/stack.js');
const { Process } = require('../interop/lib/process.js');
const { until } = require('../interop/lib/wait.js');

const claims = [];
const claim = (name, body) => claims.push({ name, body });

let lastUser = 100;
const user = () => ++lastUser;

/** Two buyers and a watcher, signed in at an event. */
async function three({ stack, browser }, event) {
  const url = `${stack.url}/demo/?event=${event}`;
  const [ann, bob, eve] = await Promise.all([
    browser.person('ann desktop light', url),
    browser.person('bob phone dark', url, { phone: true, dark: true }),
    browser.person('eve desktop dark', url, { dark: true, still: true }),
  ]);
  for (const person of [ann, bob, eve]) {
    person.user = user();
    await person.signIn(person.user);
  }
  return { ann, bob, eve };
}

const quiet = (...people) => people.forEach((person) => assert.deepEqual(person.errors, [], `${person.name}: errors in the page`));

claim('order: one locks and buys, the others see the tickets go into a cart and out of it, sold', async (stage) => {
  const { ann, bob, eve } = await three(stage, 1);
  const before = await eve.sees(eve.user, 'Deck', { cart: 0 });
  await ann.accessible('before anything');
  await bob.accessible('before anything');

  await ann.lock(ann.user, 'Deck', 3);
  await ann.hears(ann.user, '3 tickets for Deck are yours for now.');
  for (const person of [ann, bob, eve]) await person.sees(person.user, 'Deck', { free: before.free - 3, cart: 3, sold: before.sold });
  await eve.pane(eve.user).locator('.pulse li', { hasText: '3 × Deck went into a cart' }).waitFor();
  assert.match(await ann.card(ann.user, 'Deck').getByRole('timer').textContent(), /^0:(30|2\d)$/);
  for (const person of [ann, bob, eve]) {
    await person.fits();
    await person.accessible('with tickets in a cart');
    await person.shot('1-locked');
  }

  await ann.card(ann.user, 'Deck').getByRole('button', { name: 'Buy 3 tickets' }).click();
  await ann.hears(ann.user, 'Booked: 3 tickets for Deck.');
  for (const person of [ann, bob, eve]) await person.sees(person.user, 'Deck', { free: before.free - 3, cart: 0, sold: before.sold + 3 });
  const order = ann.pane(ann.user).locator('.orders li', { hasText: '3 × Deck booked' });
  await order.waitFor();
  await ann.accessible('with an order');
  await ann.shot('2-booked');
  await eve.shot('2-booked');

  await order.getByRole('button', { name: /^Cancel order/ }).click();
  await ann.hears(ann.user, /was cancelled: 3 tickets for Deck/);
  for (const person of [ann, bob, eve]) await person.sees(person.user, 'Deck', { free: before.free, cart: 0, sold: before.sold });
  const log = await ann.messages();
  for (const name of ['lock-tickets', 'order-completed', 'order-cancelled', 'POST /api/orders/with-lock']) {
    assert.ok(log.some((line) => line.includes(name)), `the log has ${name}`);
  }
  quiet(ann, bob, eve);
});

claim('expiry: who waits too long is warned 20 s before the end, and then everybody can have the tickets', async (stage) => {
  const { ann, bob, eve } = await three(stage, 1);
  const before = await eve.sees(eve.user, 'Standing', { cart: 0 });
  await bob.lock(bob.user, 'Standing', 4);
  for (const person of [ann, bob, eve]) await person.sees(person.user, 'Standing', { free: before.free - 4, cart: 4 });
  const alert = bob.pane(bob.user).getByRole('alert');
  await until(20_000, 'the warning', async () => /^Buyer \d+: (20|19) seconds left for 4 tickets, Standing\.$/.test(await alert.textContent()));
  await bob.accessible('warned');
  await bob.shot('3-warned');
  assert.equal(await bob.card(bob.user, 'Standing').evaluate((card) => card.classList.contains('late')), true);
  await bob.hears(bob.user, /Time is up: 4 tickets for Standing/, 30_000);
  for (const person of [ann, bob, eve]) await person.sees(person.user, 'Standing', { free: before.free, cart: 0, sold: before.sold });
  await eve.pane(eve.user).locator('.pulse li', { hasText: '4 × Standing came back, expired' }).waitFor();
  await bob.card(bob.user, 'Standing').getByRole('button', { name: /^Lock/ }).waitFor();
  await bob.shot('4-expired');
  quiet(ann, bob, eve);
});

claim('last tickets: two want them, one has them, and the other has them when the first lets go', async (stage) => {
  const { ann, bob, eve } = await three(stage, 2);
  await eve.sees(eve.user, 'Stalls', { free: 10, cart: 0 });
  await ann.lock(ann.user, 'Stalls', 8);
  await bob.sees(bob.user, 'Stalls', { free: 2, cart: 8 });
  await bob.lock(bob.user, 'Stalls', 3);
  await bob.hears(bob.user, 'Only 2 tickets available');
  await bob.lock(bob.user, 'Stalls', 2);
  await bob.hears(bob.user, '2 tickets for Stalls are yours for now.');
  await eve.sees(eve.user, 'Stalls', { free: 0, cart: 10 });
  const taken = eve.card(eve.user, 'Stalls').getByRole('button', { name: /^All in carts/ });
  assert.equal(await taken.isDisabled(), true);
  assert.equal(await eve.card(eve.user, 'Balcony').getByRole('button', { name: /^Sold out/ }).isDisabled(), true);
  await eve.accessible('with nothing free');
  await eve.shot('5-all-in-carts');
  await ann.card(ann.user, 'Stalls').getByRole('button', { name: 'Release' }).click();
  await ann.hears(ann.user, 'Released: 8 tickets for Stalls.');
  await eve.sees(eve.user, 'Stalls', { free: 8, cart: 2 });
  await eve.lock(eve.user, 'Stalls', 8);
  await ann.sees(ann.user, 'Stalls', { free: 0, cart: 10 });
  quiet(ann, bob, eve);
});

claim('keyboard: everything can be done without a mouse, and the focus stays where the work is', async ({ stack, browser }) => {
  const ann = await browser.person('ann desktop light', `${stack.url}/demo/?event=1`);
  const buyer = user();
  const { page } = ann;
  await page.getByLabel('User id').waitFor();
  await page.keyboard.press('Tab');
  assert.equal(await page.evaluate(() => document.activeElement.textContent), 'Skip to the tickets');
  await page.keyboard.press('Enter');
  await page.keyboard.press('Tab');
  assert.equal(await page.evaluate(() => document.activeElement.matches('.signin input')), true, 'the link leads to the sign-in');
  await page.keyboard.press('Control+A');
  await page.keyboard.type(String(buyer));
  await page.keyboard.press('Enter');
  await ann.connected(buyer);
  const card = ann.card(buyer, 'Front row');
  await card.getByRole('combobox').focus();
  await page.keyboard.press('ArrowUp');
  assert.equal(await card.getByRole('combobox').inputValue(), '1');
  await page.keyboard.press('Tab');
  await page.keyboard.press('Enter');
  await card.getByRole('button', { name: 'Buy 1 ticket' }).waitFor();
  const focused = () => page.evaluate(() => document.activeElement.className);
  await until(5000, 'the focus is on Buy', async () => (await focused()).includes('buy'));
  await page.keyboard.press('Tab');
  await page.keyboard.press('Enter');
  await ann.hears(buyer, 'Released: 1 ticket for Front row.');
  await until(5000, 'the focus is back on Lock', async () => card.getByRole('button', { name: /^Lock/ }).evaluate((button) => button === document.activeElement));
  quiet(ann);
});

claim('side by side: several buyers in one page, and the event can be changed', async ({ stack, browser }) => {
  const users = [user(), user(), user()];
  const ann = await browser.person('ann desktop light', `${stack.url}/demo/?event=1&users=${users.join(',')}`);
  for (const one of users) await ann.connected(one);
  await ann.page.getByRole('button', { name: 'Add a buyer' }).click();
  users.push(user());
  await ann.signIn(users[3]);
  await ann.lock(users[3], 'Front row', 2);
  for (const one of users) await ann.sees(one, 'Front row', { cart: 2 });
  const told = (one) => ann.pane(one).locator('.pulse li', { hasText: '2 × Front row went into a cart' });
  await told(users[0]).waitFor();
  assert.equal(await told(users[3]).count(), 0, 'one is not told of oneself');
  await ann.fits();
  await ann.accessible('four buyers');
  await ann.shot('6-side-by-side');
  assert.ok(ann.page.url().includes(`users=${encodeURIComponent(users.join(',')).replaceAll('%2C', ',')}`), ann.page.url());
  await ann.page.reload();
  await ann.connected(users[3]);
  await ann.card(users[3], 'Front row').getByRole('button', { name: 'Buy 2 tickets' }).waitFor();
  await ann.page.getByRole('combobox', { name: /^Event/ }).selectOption('2');
  for (const one of users) await ann.card(one, 'Balcony').waitFor();
  await ann.page.getByRole('combobox', { name: /^Event/ }).selectOption('1');
  const held = ann.card(users[3], 'Front row').getByRole('button', { name: 'Release' });
  await held.click();
  await ann.hears(users[3], 'Released');
  await ann.pane(users[3]).getByRole('button', { name: 'Remove buyer' }).click();
  assert.equal(await ann.page.locator('.buyer').count(), 3);
  quiet(ann);
});

claim('drops: a lost connection and a killed replica change nothing, the tickets are still there', async ({ stack, browser }) => {
  const ann = await browser.person('ann desktop light', `${stack.url}/demo/?event=1`);
  const bob = await browser.person('bob phone dark', `${stack.url}/demo/?event=1`, { phone: true, dark: true });
  for (const person of [ann, bob]) {
    person.user = user();
    await person.signIn(person.user);
    await person.lock(person.user, 'Standing', 2);
    await person.hears(person.user, '2 tickets for Standing are yours for now.');
  }
  await ann.pane(ann.user).getByRole('button', { name: 'Drop connection' }).click();
  await ann.hears(ann.user, 'Connected again. Your tickets are still yours.');
  await ann.connected(ann.user);
  stack.killReplica();
  // Whoever was there finds the other replica; whoever was not sees nothing at all.
  for (const person of [ann, bob]) {
    await until(20_000, `${person.name} can release the tickets`, async () => {
      await person.connected(person.user);
      await person.card(person.user, 'Standing').getByRole('button', { name: 'Release' }).click({ timeout: 2000 });
      return true;
    });
    await person.hears(person.user, 'Released: 2 tickets for Standing.');
  }
  quiet(ann, bob);
});

claim('swarm: simulated buyers storm the event, and nothing is oversold on any screen', async ({ stack, browser }) => {
  const ann = await browser.person('ann desktop dark', `${stack.url}/demo/?event=3`, { dark: true });
  ann.user = user();
  await ann.signIn(ann.user);
  const before = await ann.sees(ann.user, 'Golden circle', { cart: 0 });
  await ann.page.getByLabel('Buyers').fill('30');
  await ann.page.getByRole('button', { name: 'Start the swarm' }).click();
  const number = async (id) => Number(await ann.page.locator(`#${id}`).textContent());
  await until(60_000, 'the swarm has bought', async () => {
    const { free, cart, sold } = await ann.counts(ann.user, 'Golden circle');
    assert.ok(free + cart + sold === before.free + before.sold && free >= 0, JSON.stringify({ free, cart, sold }));
    return (await number('s-bought')) >= 8;
  }, 100);
  await ann.shot('7-swarm');
  await ann.accessible('in the storm');
  const stop = ann.page.getByRole('button', { name: 'Stop the swarm' });
  if (await stop.isVisible()) await stop.click();
  await until(45_000, 'the carts are empty again', async () => (await ann.page.locator('#all-cart').textContent()) === '0', 200);
  const bought = await number('s-bought');
  assert.ok((await number('s-on')) === 0 && bought >= 8);
  const response = await fetch(`${stack.url}/events/3/availability`);
  const sold = (await response.json()).reduce((sum, { totalTickets, availableTickets }) => sum + totalTickets - availableTickets, 0);
  assert.ok(sold >= bought && sold <= bought * 4, `${bought} orders of 1 to 4 tickets, ${sold} sold`);
  quiet(ann);
});

claim('file: the page works as a file against any server, and a refused connection says why', async ({ stack, browser }) => {
  const page = `file://${path.join(ROOT, 'examples', 'test-client.html')}`;
  const ann = await browser.person('ann desktop light', `${page}?server=${stack.url}&office=${stack.url}&event=1`);
  ann.user = user();
  await ann.signIn(ann.user);
  await ann.lock(ann.user, 'Deck', 1);
  await ann.hears(ann.user, '1 ticket for Deck is yours for now.');
  await ann.card(ann.user, 'Deck').getByRole('button', { name: 'Release' }).click();
  await ann.hears(ann.user, 'Released');
  const bob = await browser.person('bob phone light', `${page}?server=${stack.url}&office=${stack.url}&event=1`, { phone: true });
  await bob.page.getByText('Connection', { exact: true }).click();
  await bob.page.getByLabel('Token, if nobody hands any out').fill('nonsense');
  await bob.accessible('with the connection open');
  await bob.page.getByLabel('User id').fill('7');
  await bob.page.getByRole('button', { name: 'Sign in' }).click();
  await bob.pane(7).locator('.pill', { hasText: 'refused: unauthorized' }).waitFor();
  await bob.hears(7, 'The service refused the sign-in.');
  await bob.shot('8-refused');
  await bob.page.getByLabel('Token, if nobody hands any out').fill('');
  await bob.pane(7).getByRole('button', { name: 'Sign in' }).click();
  await bob.connected(7);
  quiet(ann, bob);
});

claim('demo: alone, the service shows the page, locks and releases, and says what buying needs', async ({ bin, browser }) => {
  const port = await freePort();
  const demo = new Process('seatlock --demo', path.join(bin, 'seatlock'), ['--demo'], {
    env: { PATH: process.env.PATH, SEATLOCK_LISTEN: `127.0.0.1:${port}` },
  });
  try {
    await until(15_000, 'the demo serves', async () => (await fetch(`http://127.0.0.1:${port}/readyz`)).status === 200);
    const ann = await browser.person('ann phone light', `http://localhost:${port}/demo/`, { phone: true });
    await ann.page.getByText('To buy, start the whole stack with deploy/local/run.').waitFor();
    ann.user = user();
    await ann.signIn(ann.user);
    await ann.lock(ann.user, 'Deck', 2);
    const buy = ann.card(ann.user, 'Deck').getByRole('button', { name: 'Buying needs the box office' });
    await buy.waitFor();
    assert.equal(await buy.isDisabled(), true);
    await ann.fits();
    await ann.accessible('the demo');
    await ann.shot('9-demo');
    await ann.card(ann.user, 'Deck').getByRole('button', { name: 'Release' }).click();
    await ann.hears(ann.user, 'Released: 2 tickets for Deck.');
    quiet(ann);
  } finally {
    await demo.stop();
  }
});

claim('page: it is one file, with the client library unchanged inside', async () => {
  const page = fs.readFileSync(path.join(ROOT, 'examples', 'test-client.html'), 'utf8');
  const library = fs.readFileSync(path.join(ROOT, 'examples', 'vendor', 'socket.io.min.js'), 'utf8');
  assert.ok(page.includes(`<script>\n${library}</script>`));
  assert.doesNotMatch(page.replace(library, ''), /<script[^>]+src=|<link[^>]+href="(?!data:)|@import|url\(/);
});

claim('compose: deploy/compose.yaml is YAML, sets only what the programs read, and names only what it has', async ({ bin }) => {
  const text = fs.readFileSync(path.join(ROOT, 'deploy', 'compose.yaml'), 'utf8');
  const { services, configs, volumes } = YAML.parse(text, { merge: true });
  const known = {
    SEATLOCK_: execFileSync(path.join(bin, 'seatlock'), ['--help'], { encoding: 'utf8' }),
    BOX_OFFICE_: fs.readFileSync(path.join(ROOT, 'examples', 'box-office', 'src', 'config.rs'), 'utf8'),
  };
  const set = new Set();
  for (const [name, service] of Object.entries(services)) {
    for (const variable of Object.keys(service.environment ?? {})) {
      const [, described] = Object.entries(known).find(([prefix]) => variable.startsWith(prefix)) ?? [];
      if (described === undefined) {
        assert.match(variable, /^(POSTGRES|RABBITMQ)_/, `${name}: whose variable is ${variable}?`);
      } else {
        assert.match(described, new RegExp(`\\b${variable}\\b`), `${name}: ${variable} is read by nobody`);
        set.add(variable);
      }
    }
    assert.ok(/:\d/.test(service.image) && !service.image.endsWith('latest'), `${name}: ${service.image} is a version`);
    const needs = Array.isArray(service.depends_on) ? service.depends_on : Object.keys(service.depends_on ?? {});
    for (const other of needs) assert.ok(services[other], `${name} depends on ${other}`);
    for (const volume of service.volumes ?? []) assert.ok(volume.split(':')[0] in volumes, `${name}: ${volume}`);
    for (const { source } of service.configs ?? []) assert.ok(configs[source], `${name}: config ${source}`);
    // Hosts in addresses are services.
    for (const value of Object.values(service.environment ?? {})) {
      const host = /^\w+:\/\/(?:[^@/]+@)?([a-z-]+)[:/]/.exec(value)?.[1];
      if (host) assert.ok(services[host], `${name}: no service ${host} for ${value}`);
    }
  }
  for (const required of ['SEATLOCK_REDIS_URL', 'SEATLOCK_EVENTS_URL', 'SEATLOCK_JWT_SECRET', 'BOX_OFFICE_DATABASE_URL']) {
    assert.ok(set.has(required), `${required} is set`);
  }
  assert.deepEqual(services['seatlock-a'], services['seatlock-b']);
  for (const [, host, port] of configs.haproxy.content.matchAll(/server \w+ ([a-z-]+):(\d+)/g)) {
    const environment = services[host]?.environment ?? {};
    assert.ok([environment.SEATLOCK_LISTEN, environment.BOX_OFFICE_LISTEN].some((listen) => listen?.endsWith(`:${port}`)), `${host}:${port}`);
  }
});

module.exports = claims;
