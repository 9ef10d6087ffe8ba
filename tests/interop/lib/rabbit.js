'use strict';
// A RabbitMQ broker of one's own (own node, ports, epmd and files), and a bare channel to look at its queues with.

const fs = require('node:fs');
const os = require('node:os');
const path = require('node:path');
const amqp = require('amqplib');
const { Process, accepts, freePort, removeFolder } = require('./process.js');
const { Hopeless, until, within } = require('./wait.js');

/** Debian's script in sbin changes the user and the environment; the one it calls does not. */
function serverScript() {
  const plain = ['/usr/lib/rabbitmq/bin/rabbitmq-server', '/opt/homebrew/sbin/rabbitmq-server'];
  return plain.find((file) => fs.existsSync(file)) ?? 'rabbitmq-server';
}

class Broker {
  static async start() {
    const broker = new Broker();
    broker.dir = fs.mkdtempSync(path.join(os.tmpdir(), 'seatlock-rabbit-'));
    broker.port = await freePort();
    const dist = await freePort();
    const names = await freePort();
    const at = (name) => path.join(broker.dir, name);
    fs.writeFileSync(at('plugins'), '[].\n');
    fs.writeFileSync(at('rabbitmq.conf'), `listeners.tcp.1 = 127.0.0.1:${broker.port}\nlog.console = true\nlog.file = false\n`);
    // Without one of ours the broker would start a name server that outlives it.
    broker.names = new Process('epmd', 'epmd', ['-port', String(names), '-address', '127.0.0.1']);
    const env = {
      PATH: process.env.PATH,
      LANG: 'C.UTF-8',
      HOME: broker.dir,
      ERL_EPMD_PORT: String(names),
      ERL_EPMD_ADDRESS: '127.0.0.1',
      RABBITMQ_NODENAME: `seatlock-${process.pid}@localhost`,
      RABBITMQ_DIST_PORT: String(dist),
      RABBITMQ_MNESIA_BASE: at('mnesia'),
      RABBITMQ_LOG_BASE: at('log'),
      RABBITMQ_SCHEMA_DIR: at('schema'),
      RABBITMQ_GENERATED_CONFIG_DIR: at('generated'),
      RABBITMQ_CONFIG_FILE: at('rabbitmq'),
      RABBITMQ_ENABLED_PLUGINS_FILE: at('plugins'),
      // The script replaces itself by the virtual machine, as for a service manager: its process is the one we end.
      RUNNING_UNDER_SYSTEMD: 'true',
    };
    broker.process = new Process('rabbitmq', serverScript(), [], { env });
    try {
      await until(60_000, 'the broker accepts AMQP connections', async () => {
        if (!broker.process.alive) throw new Hopeless(`rabbitmq-server ended: ${broker.process.log.join('\n')}`);
        if (!(await accepts(broker.port))) return false;
        const connection = await amqp.connect(broker.url);
        await connection.close();
        return true;
      }, 200);
    } catch (error) {
      await broker.stop().catch(() => {});
      throw error;
    }
    return broker;
  }

  get url() {
    return `amqp://guest:guest@127.0.0.1:${this.port}`;
  }

  async stop() {
    // Nothing of the broker's is kept, so nothing is gained by a slow farewell.
    await this.process.kill();
    await this.names.kill();
    removeFolder(this.dir);
  }
}

/** A bare AMQP connection: what an operator's tool, or a stranger, can do to a queue. */
class Wire {
  static async open(url) {
    const wire = new Wire();
    wire.connection = await within(5000, 'AMQP connection', amqp.connect(url));
    wire.connection.on('error', () => {});
    return wire;
  }

  async channel() {
    const channel = await this.connection.createChannel();
    channel.on('error', () => {});
    return channel;
  }

  /** `{messageCount, consumerCount}`, or nothing when there is no such queue. */
  async look(queue) {
    const channel = await this.channel();
    try {
      const seen = await within(5000, `passive declare of ${queue}`, channel.checkQueue(queue));
      await channel.close();
      return seen;
    } catch (error) {
      if (/404|NOT_FOUND/.test(error.message)) return undefined;
      throw error;
    }
  }

  async delete(queue) {
    const channel = await this.channel();
    await within(5000, `deletion of ${queue}`, channel.deleteQueue(queue));
    await channel.close();
  }

  async publish(queue, body, properties = {}) {
    const channel = await this.connection.createConfirmChannel();
    channel.sendToQueue(queue, Buffer.from(body), { headers: {}, ...properties });
    await within(5000, `publish to ${queue}`, channel.waitForConfirms());
    await channel.close();
  }

  /** One request, and the exact text of its reply. */
  async ask(queue, body, ms = 5000) {
    const channel = await this.channel();
    try {
      const reply = new Promise((resolve, reject) => {
        channel
          .consume('amq.rabbitmq.reply-to', (message) => message && resolve(message), { noAck: true })
          .then(() => {
            channel.sendToQueue(queue, Buffer.from(body), {
              headers: {}, deliveryMode: 1, correlationId: 'c-1', replyTo: 'amq.rabbitmq.reply-to',
            });
          })
          .catch(reject);
      });
      const message = await within(ms, `a reply to ${String(body).slice(0, 80)}`, reply);
      return { text: message.content.toString('utf8'), correlationId: message.properties.correlationId };
    } finally {
      await channel.close();
    }
  }

  close() {
    return this.connection.close();
  }
}

module.exports = { Broker, Wire };
