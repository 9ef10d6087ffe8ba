//! The events-service of the fault run: it knows what is unsold, answers over NestJS TCP, dies and comes back.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use seatlock::inventory::Frames;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::support::free_port;

/// The tickets of one category.
#[derive(Debug, Clone, Copy)]
pub struct Seats {
    pub total: u64,
    pub sold: u64,
}

pub type Book = Arc<Mutex<BTreeMap<u64, Seats>>>;

pub struct Shop {
    pub address: SocketAddr,
    pub book: Book,
    serving: Option<(JoinHandle<()>, CancellationToken)>,
}

impl Shop {
    /// Opens with one event whose categories have so many tickets.
    pub fn open(categories: &[(u64, u64)]) -> Self {
        let book = categories.iter().map(|&(id, total)| (id, Seats { total, sold: 0 })).collect();
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let mut shop = Self { address, book: Arc::new(Mutex::new(book)), serving: None };
        shop.reopen();
        shop
    }

    /// The process dies: nobody listens, every connection breaks.
    pub async fn kill(&mut self) {
        if let Some((serving, stop)) = self.serving.take() {
            stop.cancel();
            serving.await.expect("the shop does not panic");
        }
    }

    pub fn reopen(&mut self) {
        let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
        socket.set_reuseaddr(true).expect("a socket");
        socket.bind(self.address).expect("our own port");
        let listener = socket.listen(64).expect("our own port");
        let (book, stop) = (Arc::clone(&self.book), CancellationToken::new());
        let serving = tokio::spawn(serve(listener, book, stop.clone()));
        self.serving = Some((serving, stop));
    }
}

async fn serve(listener: TcpListener, book: Book, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => if let Ok((stream, _)) = accepted {
                let (book, stop) = (Arc::clone(&book), stop.clone());
                tokio::spawn(async move { stop.run_until_cancelled(answer(stream, book)).await });
            }
        }
    }
}

/// Answers one connection until it ends.
async fn answer(mut stream: TcpStream, book: Book) {
    let (mut frames, mut bytes) = (Frames::default(), vec![0; 4096]);
    while let Ok(len @ 1..) = stream.read(&mut bytes).await {
        frames.push(&bytes[..len]);
        while let Ok(Some(question)) = frames.next_frame() {
            let reply = reply(&question, &book).to_string();
            let frame = format!("{}#{reply}", reply.encode_utf16().count());
            if stream.write_all(frame.as_bytes()).await.is_err() {
                return;
            }
        }
    }
}

fn reply(question: &Value, book: &Book) -> Value {
    let id = &question["id"];
    if question["data"] != super::EVENT {
        return json!({"err": {"status": 404, "message": "Event not found"}, "isDisposed": true, "id": id});
    }
    let book = book.lock().unwrap();
    let categories: Vec<Value> = book
        .iter()
        .map(|(id, seats)| json!({"id": id, "totalSeats": seats.total, "availableSeats": seats.total - seats.sold}))
        .collect();
    json!({"response": categories, "isDisposed": true, "id": id})
}
