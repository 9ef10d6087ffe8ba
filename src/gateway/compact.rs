//! What is kept of the request that opened a session.
//!
//! socketioxide keeps that request for as long as the session lives. As it comes from HTTP, its texts are parts of the
//! buffer into which the header was read, and hold 8 KiB of memory for each socket. So what opens a session is copied: the
//! few headers that are still read, and nothing of what the router noted on the way.

use axum::http::{Extensions, HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, header};

use super::handshake::Guest;
use crate::telemetry;

/// What the transport and the handshake of the namespace still read. The map has room for six in its least memory.
const KEPT: [HeaderName; 2] = [header::AUTHORIZATION, HeaderName::from_static("traceparent")];

/// What is kept where spans are exported.
const STATE: HeaderName = HeaderName::from_static("tracestate");

/// The same request in little memory. Posts open no session and stay as they are.
pub fn compact<B>(request: Request<B>) -> Request<B> {
    if *request.method() != Method::GET {
        return request;
    }
    let (mut parts, body) = request.into_parts();
    let mut headers = HeaderMap::new();
    for name in KEPT {
        // A value that was read from a connection can be read again.
        if let Some(Ok(value)) = parts.headers.get(&name).map(|value| HeaderValue::from_bytes(value.as_bytes())) {
            headers.insert(name, value);
        }
    }
    if telemetry::exports() {
        // A little more than is passed on, so that it shows where it was cut.
        let mut room = telemetry::STATE_BYTES_MAX + 1;
        for value in parts.headers.get_all(&STATE) {
            let part = &value.as_bytes()[..value.len().min(room)];
            if let Ok(copy) = HeaderValue::from_bytes(part)
                && room > 0
            {
                headers.append(STATE, copy);
            }
            room -= part.len();
        }
    }
    if let Ok(uri) = parts.uri.to_string().parse::<Uri>() {
        parts.uri = uri;
    }
    let mut extensions = Extensions::new();
    if let Some(guest) = parts.extensions.remove::<Guest>() {
        extensions.insert(guest);
    }
    (parts.headers, parts.extensions) = (headers, extensions);
    Request::from_parts(parts, body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_opens_a_session_is_copied_and_only_what_is_read_is_kept() {
        let wire = bytes::Bytes::from_static(b"Bearer abc");
        let kept = HeaderValue::from_maybe_shared(wire.clone()).expect("a header");
        let request = |method: Method| {
            Request::builder()
                .method(method)
                .uri("/socket.io/?EIO=4&transport=polling")
                .header(header::AUTHORIZATION, kept.clone())
                .header(header::COOKIE, "a=b")
                .header("traceparent", "00-1-2-01")
                .extension(7_u8)
                .body(())
                .expect("a request")
        };
        let small = compact(request(Method::GET));
        assert_eq!(small.uri(), "/socket.io/?EIO=4&transport=polling");
        assert_eq!(small.headers().len(), 2);
        assert_eq!(small.headers()["traceparent"], "00-1-2-01");
        let copy = &small.headers()[header::AUTHORIZATION];
        assert_eq!(copy, "Bearer abc");
        assert_ne!(copy.as_bytes().as_ptr(), wire.as_ptr(), "a copy");
        assert!(small.extensions().get::<u8>().is_none());
        assert_eq!(compact(request(Method::POST)).headers().len(), 3);
    }
}
