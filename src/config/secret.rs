//! Values that must never be printed, and what is printed in their place.

use std::fmt;

/// A text that no output ever shows.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Box<str>);

impl Secret {
    /// Keeps `text` from being printed by accident.
    #[must_use]
    pub fn new(text: impl Into<Box<str>>) -> Self {
        Self(text.into())
    }

    /// The text itself, for whoever needs to use it.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// A URL that may carry a password. What is printed of it is [`redacted`].
#[derive(Clone, PartialEq, Eq)]
pub struct SecretUrl(Box<str>);

impl SecretUrl {
    /// Keeps the passwords in `url` from being printed by accident.
    #[must_use]
    pub fn new(url: impl Into<Box<str>>) -> Self {
        Self(url.into())
    }

    /// The whole URL, for whoever connects to it.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// What stands before the first colon.
    #[must_use]
    pub fn scheme(&self) -> &str {
        self.0.split_once(':').map_or("", |(scheme, _)| scheme)
    }
}

impl fmt::Debug for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&redacted(&self.0))
    }
}

impl fmt::Display for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&redacted(&self.0))
    }
}

/// What may be printed of a URL: scheme, host, port and path. User, password and query can each hold a secret and are
/// replaced by `***`; so is everything behind the scheme when a stray `@` or a missing scheme leaves it open where the
/// password ends.
#[must_use]
pub fn redacted(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once(':') else { return "***".to_owned() };
    if scheme.is_empty() || !scheme.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte)) {
        return "***".to_owned();
    }
    let (slashes, rest) = rest.strip_prefix("//").map_or(("", rest), |rest| ("//", rest));
    let (rest, query) = match rest.find(['?', '#']) {
        Some(at) => (&rest[..at], &rest[at..]),
        None => (rest, ""),
    };
    let (authority, path) = match rest.find('/') {
        Some(at) => rest.split_at(at),
        None => (rest, ""),
    };
    if path.contains('@') || query.contains('@') {
        return format!("{scheme}:{slashes}***");
    }
    let (user, host) = authority.rsplit_once('@').map_or(("", authority), |(_, host)| ("***@", host));
    let query = if query.is_empty() { "" } else { "?***" };
    format!("{scheme}:{slashes}{user}{host}{path}{query}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_of_a_url_never_holds_its_password() {
        for (url, printed) in [
            ("redis://127.0.0.1:6379/0", "redis://127.0.0.1:6379/0"),
            ("redis://:hunter2@cache:6379", "redis://***@cache:6379"),
            ("rediss://hunter2@cache", "rediss://***@cache"),
            ("amqp://guest:hunter2@rabbit:5672/shop?queue=hunter2", "amqp://***@rabbit:5672/shop?***"),
            ("redis://:hun@ter2@cache", "redis://***@cache"),
            ("redis://:hun/ter2@cache", "redis://***"),
            ("redis://:hun#ter2@cache", "redis://***"),
            ("unix:/run/redis.sock", "unix:/run/redis.sock"),
            ("unix:/run/redis.sock?password=hunter2", "unix:/run/redis.sock?***"),
            ("hunter2", "***"),
            ("hunter2@cache:6379", "***"),
            ("", "***"),
        ] {
            assert_eq!(redacted(url), printed);
            assert_eq!(format!("{} {:?}", SecretUrl::new(url), SecretUrl::new(url)), format!("{printed} {printed}"));
        }
        assert_eq!(format!("{0} {0:?}", Secret::new("hunter2")), "*** ***");
    }
}
