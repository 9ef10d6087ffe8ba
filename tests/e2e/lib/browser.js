'use strict';
// Chromium, and people in it: each has a window of its own.

const assert = require('node:assert/strict');
const fs = require('node:fs');
const path = require('node:path');
const axe = require('axe-core');
const { chromium } = require('playwright-core');
const { until } = require('../../interop/lib/wait.js');

const PROGRAMS = ['/usr/bin/chromium', '/usr/bin/chromium-browser', '/usr/bin/google-chrome'];
const FLAGS = [
  '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
  '--disable-component-update', '--disable-sync',
];
/** WCAG 2.2 AA and what is below it, and axe's own advice. */
const RULES = ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice'];
const PATIENCE_MS = 15_000;

const DESKTOP = { viewport: { width: 1360, height: 900 } };
const PHONE = { viewport: { width: 390, height: 844 }, hasTouch: true, isMobile: true };

class Browser {
  static async launch(shots) {
    const browser = new Browser();
    const executablePath = process.env.CHROMIUM ?? PROGRAMS.find((file) => fs.existsSync(file));
    if (!executablePath) throw new Error('Chromium is not installed (tests/run installs it)');
    browser.chromium = await chromium.launch({ executablePath, args: FLAGS });
    browser.shots = shots;
    browser.people = [];
    return browser;
  }

  /**
   * A person with a window on a page.
   * @param {{phone?: boolean, dark?: boolean, still?: boolean}} look `still` asks for reduced motion
   */
  async person(name, url, { phone = false, dark = false, still = false } = {}) {
    const context = await this.chromium.newContext({
      ...(phone ? PHONE : DESKTOP), colorScheme: dark ? 'dark' : 'light', reducedMotion: still ? 'reduce' : 'no-preference',
    });
    const page = await context.newPage();
    page.setDefaultTimeout(PATIENCE_MS);
    const person = new Person(name, page, this.shots);
    this.people.push(person);
    await page.goto(url);
    return person;
  }

  /** What everybody sees now. */
  async evidence(name) {
    for (const person of this.people) {
      await person.shot(`failed-${name.replaceAll(/[^a-z]+/gi, '-')}`).catch(() => {});
      console.log(`${person.name}:\n  ${person.errors.join('\n  ')}\n  ${(await person.messages().catch(() => [])).slice(0, 15).join('\n  ')}`);
    }
  }

  async forget() {
    for (const person of this.people) await person.page.context().close();
    this.people = [];
  }

  close() {
    return this.chromium.close();
  }
}

class Person {
  constructor(name, page, shots) {
    Object.assign(this, { name, page, shots, errors: [] });
    page.on('pageerror', (error) => this.errors.push(error.stack ?? error.message));
  }

  async signIn(user) {
    const pane = this.page.locator('.buyer').last();
    await pane.getByLabel('User id').fill(String(user));
    await pane.getByRole('button', { name: 'Sign in' }).click();
    await this.connected(user);
    return this.pane(user);
  }

  pane(user) {
    return this.page.locator(`.buyer[data-user="${user}"]`);
  }

  connected(user) {
    return this.pane(user).locator('.pill', { hasText: /^connected$/ }).waitFor();
  }

  card(user, category) {
    return this.pane(user).getByRole('group', { name: category, exact: true });
  }

  /** `{free, cart, sold}` as they are written on a card. */
  async counts(user, category) {
    const [free, cart, sold] = (await this.card(user, category).locator('.counts dd').allTextContents()).map(Number);
    return { free, cart, sold };
  }

  /** Until a card says so. */
  sees(user, category, wanted, ms = PATIENCE_MS) {
    return until(ms, `${this.name} sees ${JSON.stringify(wanted)} of ${category}`, async () => {
      const counts = await this.counts(user, category);
      const same = Object.entries(wanted).every(([key, value]) => counts[key] === value);
      if (!same) throw new Error(JSON.stringify(counts));
      return counts;
    }, 50);
  }

  /** Until the pane's status line says something. */
  async hears(user, words, ms = PATIENCE_MS) {
    await this.pane(user).locator('.said', { hasText: words }).waitFor({ timeout: ms });
  }

  async lock(user, category, quantity) {
    const card = this.card(user, category);
    await card.getByRole('combobox').selectOption(String(quantity));
    await card.getByRole('button', { name: /^Lock/ }).click();
  }

  messages() {
    return this.page.locator('#log li').allTextContents();
  }

  async shot(name) {
    const file = path.join(this.shots, `${name}-${this.name.replaceAll(' ', '-')}.png`);
    await this.page.screenshot({ path: file, fullPage: true });
  }

  /** Nothing that axe complains of, as the page is now. */
  async accessible(when) {
    await this.page.evaluate(axe.source);
    const { violations, passes } = await this.page.evaluate((values) => window.axe.run({ runOnly: { type: 'tag', values } }), RULES);
    const complaints = violations.flatMap(({ id, nodes }) => nodes.map((node) => `${id}: ${node.target.join(' ')}: ${node.failureSummary}`));
    assert.deepEqual(complaints, [], `${this.name}, ${when}`);
    assert.ok(passes.length > 10, `axe looked at something: ${passes.length} rules`);
  }

  /** Nothing is wider than the window. */
  async fits() {
    const [wide, window] = await this.page.evaluate(() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]);
    assert.ok(wide <= window, `${this.name}'s page is ${wide} wide in a window of ${window}`);
  }
}

module.exports = { Browser };
