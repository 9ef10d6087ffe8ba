// One real socket.io-client, driven over stdin and stdout, one JSON object a line.
//
// Commands: {do: "connect", url, options} · {do: "emit", name, data, ack?} (the acknowledgement is reported under
// `ack`) · {do: "transport"} · {do: "auth", auth} · {do: "disconnect"} · {do: "drop"}. Reports: {connect} · {connect_error, active} ·
// {disconnect, active} · {event, data} · {ack, data} · {transport}.
import readline from "node:readline";

import { io } from "socket.io-client";

let socket;

function report(message) {
  process.stdout.write(`${JSON.stringify(message)}\n`);
}

function connect({ url, options }) {
  // Fast enough for a test, and still the client's own way of coming back.
  socket = io(`${url}/realtime`, { forceNew: true, reconnectionDelay: 50, reconnectionDelayMax: 200, ...options });
  socket.on("connect", () => report({ connect: true }));
  socket.on("connect_error", (error) => report({ connect_error: error.message, active: socket.active }));
  socket.on("disconnect", (reason) => report({ disconnect: reason, active: socket.active }));
  socket.onAny((event, data) => report({ event, data }));
}

function obey(command) {
  switch (command.do) {
    case "connect":
      return connect(command);
    case "emit": {
      const args = "data" in command ? [command.data] : [];
      if ("ack" in command) args.push((data) => report({ ack: command.ack, data }));
      return socket.emit(command.name, ...args);
    }
    case "transport":
      return report({ transport: socket.io.engine.transport.name });
    case "auth":
      socket.auth = command.auth;
      return undefined;
    case "disconnect":
      return socket.disconnect();
    case "drop":
      // The connection ends and the client comes back by itself.
      return socket.io.engine.close();
    default:
      throw new Error(`unknown command ${command.do}`);
  }
}

const lines = readline.createInterface({ input: process.stdin });
lines.on("line", (line) => obey(JSON.parse(line)));
// The test is over when it closes our stdin.
lines.on("close", () => process.exit(0));
