//! A Socket.IO client over WebSocket that costs little: the machine's processors are shared with what is measured.
//!
//! One thread, one buffer for reading; what a message says is looked for in its text.

use std::cell::RefCell;

use anyhow::{Context as _, bail, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// What a browser sends with the opening of a WebSocket.
const BROWSER: &str = "User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) \
    Chrome/130.0.0.0 Safari/537.36\r\nOrigin: https://shop.example\r\nPragma: no-cache\r\nCache-Control: no-cache\r\n\
    Accept-Encoding: gzip, deflate, br, zstd\r\nAccept-Language: en-GB,en;q=0.9,de;q=0.8\r\n\
    Cookie: session=7f9c2ba4e88f827d616045507605853e; consent=1\r\n\
    Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n";

thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; 256 * 1024]);
}

/// One connection, connected to the namespace.
pub struct Socket {
    stream: TcpStream,
    /// The beginning of a frame whose end has not come.
    rest: Vec<u8>,
}

impl Socket {
    /// Opens the transport and the namespace.
    pub async fn open(port: u16, token: &str) -> anyhow::Result<Self> {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
        stream.set_nodelay(true)?;
        let request = format!(
            "GET /socket.io/?EIO=4&transport=websocket HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: Upgrade\r\n\
             {BROWSER}Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\
             \r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await?);
            ensure!(head.len() < 4096, "no end of the answer's header");
        }
        ensure!(head.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&head));
        let mut socket = Self { stream, rest: Vec::new() };
        socket.send(&format!("40/realtime,{{\"token\":\"{token}\"}}")).await?;
        let mut connected = false;
        while !connected {
            let mut refused = None;
            socket
                .read(|text| {
                    connected |= text.starts_with("40/realtime");
                    if text.starts_with("44") {
                        refused = Some(text.to_owned());
                    }
                })
                .await?;
            if let Some(refused) = refused {
                bail!("refused: {refused}");
            }
        }
        Ok(socket)
    }

    /// Sends one Engine.IO packet.
    pub async fn send(&mut self, text: &str) -> anyhow::Result<()> {
        self.stream.write_all(&frame(text)?).await?;
        Ok(())
    }

    /// Waits for data and shows each packet in it. Pings are answered here.
    pub async fn read(&mut self, mut each: impl FnMut(&str)) -> anyhow::Result<()> {
        self.stream.readable().await?;
        let pinged = SCRATCH.with_borrow_mut(|scratch| -> anyhow::Result<bool> {
            let read = match self.stream.try_read(scratch) {
                Ok(0) => bail!("the server closed the connection"),
                Ok(read) => &scratch[..read],
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error.into()),
            };
            let mut pinged = false;
            let mut show = |text: &str| if text == "2" { pinged = true } else { each(text) };
            if self.rest.is_empty() {
                let left = frames(read, &mut show)?;
                self.rest.extend_from_slice(left);
            } else {
                let mut all = std::mem::take(&mut self.rest);
                all.extend_from_slice(read);
                let left = frames(&all, &mut show)?;
                self.rest.extend_from_slice(left);
            }
            if self.rest.is_empty() {
                self.rest = Vec::new();
            }
            Ok(pinged)
        })?;
        if pinged {
            self.send("3").await?;
        }
        Ok(())
    }
}

/// A masked text frame; the mask is zero, which is one of the possible ones.
fn frame(text: &str) -> anyhow::Result<Vec<u8>> {
    let mut frame = vec![0x81];
    match u8::try_from(text.len()) {
        Ok(len) if len < 126 => frame.push(0x80 | len),
        _ => {
            frame.push(0xfe);
            frame.extend_from_slice(&u16::try_from(text.len()).context("a long message")?.to_be_bytes());
        }
    }
    frame.extend_from_slice(&[0; 4]);
    frame.extend_from_slice(text.as_bytes());
    Ok(frame)
}

/// Shows the text of each whole frame; returns what is left.
fn frames<'a>(mut data: &'a [u8], show: &mut impl FnMut(&str)) -> anyhow::Result<&'a [u8]> {
    loop {
        let (len, from) = match *data {
            [_, len, ..] if len < 126 => (usize::from(len), 2),
            [_, 126, high, low, ..] => (usize::from(u16::from_be_bytes([high, low])), 4),
            [_, 127, ..] => bail!("a frame of more than 64 KiB"),
            _ => return Ok(data),
        };
        let Some(payload) = data.get(from..from + len) else { return Ok(data) };
        match data[0] {
            0x81 => show(std::str::from_utf8(payload)?),
            0x88 => bail!("the server closed the WebSocket"),
            other => bail!("a frame that begins with {other:#x}"),
        }
        data = &data[from + len..];
    }
}

/// The number behind `"name":` in a text.
pub fn number(text: &str, name: &str) -> Option<u64> {
    let from = text.find(name)? + name.len();
    let digits = text[from..].bytes().take_while(u8::is_ascii_digit).count();
    text[from..from + digits].parse().ok()
}

/// The text behind `"name":"` in a text.
pub fn word<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let from = text.find(name)? + name.len();
    text[from..].split('"').next()
}
