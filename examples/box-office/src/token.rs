//! Bearer tokens: HS256, the user in `sub`, the same key as Seatlock's.

use std::time::Duration;

use anyhow::Result;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde::{Deserialize, Serialize};

/// How long a token is good. Pages ask for the next one in time.
pub const LIFETIME: Duration = Duration::from_hours(1);

#[derive(Serialize, Deserialize)]
struct Claims {
    sub: String,
    iat: i64,
    exp: i64,
}

/// Makes and reads tokens.
pub struct Tokens {
    encoding: EncodingKey,
    decoding: DecodingKey,
}

impl Tokens {
    /// With this key.
    pub fn new(secret: &str) -> Self {
        let secret = secret.as_bytes();
        Self { encoding: EncodingKey::from_secret(secret), decoding: DecodingKey::from_secret(secret) }
    }

    /// A token for a user.
    pub fn issue(&self, user_id: i64) -> Result<String> {
        let now = chrono::Utc::now().timestamp();
        let exp = now + i64::try_from(LIFETIME.as_secs())?;
        let claims = Claims { sub: user_id.to_string(), iat: now, exp };
        Ok(jsonwebtoken::encode(&Header::new(Algorithm::HS256), &claims, &self.encoding)?)
    }

    /// Whose token it is, if it is one of ours and still good.
    pub fn user(&self, token: &str) -> Option<i64> {
        // The algorithm is ours to choose, never the token's.
        let read = jsonwebtoken::decode::<Claims>(token, &self.decoding, &Validation::new(Algorithm::HS256));
        read.ok()?.claims.sub.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_tokens_of_the_same_key_are_good() {
        let ours = Tokens::new("a secret of the tests, long enough to be one");
        let theirs = Tokens::new("another secret of the tests, just as long");
        let token = ours.issue(7).unwrap();
        assert_eq!(ours.user(&token), Some(7));
        assert_eq!(theirs.user(&token), None);
        assert_eq!(ours.user("nonsense"), None);
    }
}
