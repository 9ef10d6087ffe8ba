//! A key that verifies tokens, together with the algorithms it may be used with.
//!
//! Owns the reading of PEM blocks and of JSON Web Keys. Knows no token and no network. The algorithms follow from the
//! key's own type, so a public key can never be taken for the secret of an HMAC.

use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyOperations, PublicKeyUse};
use jsonwebtoken::{Algorithm, AlgorithmFamily, DecodingKey, Validation};

/// The bytes of an RSA modulus: 2048 bits are the least that RFC 7518, 3.3 allows, 8192 the most that is worth the CPU
/// time of every handshake (and the limits of the library underneath).
const MODULUS_BYTES: std::ops::RangeInclusive<usize> = 256..=1024;

/// Why the configured keys cannot verify tokens.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// A secret of no bytes: anybody knows it.
    #[error("the token secret is empty")]
    EmptySecret,
    /// A PEM block where a secret is expected: a public key used as a secret lets everybody sign.
    #[error("the token secret is a PEM block; configure it as the public key file")]
    SecretIsPem,
    /// Not exactly one PEM block.
    #[error("the public key is not one PEM block (found {0})")]
    NotOnePem(usize),
    /// A private key, a certificate or something else in PEM.
    #[error("the PEM block is a {0:?}; expected \"PUBLIC KEY\" or \"RSA PUBLIC KEY\"")]
    NotPublic(String),
    /// Unreadable, or of a type that no algorithm here verifies.
    #[error("not a usable public key: RSA of 2048 to 8192 bits, EC P-256 or P-384, and Ed25519 are")]
    Unsupported,
    /// A key set is fetched over `http` or `https` only.
    #[error("a key set is fetched over http or https, not {0}")]
    Scheme(String),
    /// The HTTPS client could not be set up; in practice the machine has no root certificates.
    #[error("the HTTPS client for the key set could not be set up")]
    Client(#[source] reqwest::Error),
}

/// One key and what it may verify.
pub(super) struct VerifyingKey {
    /// The `kid` it has in its key set.
    pub id: Option<String>,
    pub decoding: DecodingKey,
    /// Issuer and audience as configured, and in `algorithms` what this key may be used with: one family, never empty.
    pub validation: Validation,
}

impl VerifyingKey {
    /// An HMAC secret.
    pub fn secret(secret: &[u8], checks: &Validation) -> Result<Self, KeyError> {
        if secret.is_empty() {
            return Err(KeyError::EmptySecret);
        }
        if secret.trim_ascii_start().starts_with(b"-----BEGIN ") {
            return Err(KeyError::SecretIsPem);
        }
        let algorithms = AlgorithmFamily::Hmac.algorithms().to_vec();
        Ok(Self::with(None, DecodingKey::from_secret(secret), algorithms, checks))
    }

    /// The one public key of a PEM file.
    pub fn pem(pem: &[u8], checks: &Validation) -> Result<Self, KeyError> {
        let text = str::from_utf8(pem).map_err(|_| KeyError::NotOnePem(0))?;
        let labels: Vec<&str> =
            text.lines().filter_map(|line| line.trim().strip_prefix("-----BEGIN ")?.strip_suffix("-----")).collect();
        match labels[..] {
            ["PUBLIC KEY" | "RSA PUBLIC KEY"] => {}
            [other] => return Err(KeyError::NotPublic(other.to_owned())),
            _ => return Err(KeyError::NotOnePem(labels.len())),
        }
        let decoding = DecodingKey::from_rsa_pem(pem)
            .or_else(|_| DecodingKey::from_ec_pem(pem))
            .or_else(|_| DecodingKey::from_ed_pem(pem))
            .map_err(|_| KeyError::Unsupported)?;
        let algorithms = asymmetric_algorithms(&decoding).ok_or(KeyError::Unsupported)?;
        Ok(Self::with(None, decoding, algorithms, checks))
    }

    /// A key of a key set; none when it does not verify signatures or its type is not supported here. A symmetric key
    /// is never taken: whoever can read the set could sign with it.
    pub fn jwk(key: &Jwk, checks: &Validation) -> Option<Self> {
        let common = &key.common;
        if common.public_key_use.as_ref().is_some_and(|purpose| *purpose != PublicKeyUse::Signature)
            || common.key_operations.as_ref().is_some_and(|allowed| !allowed.contains(&KeyOperations::Verify))
        {
            return None;
        }
        let decoding = DecodingKey::from_jwk(key).ok()?;
        let mut algorithms = asymmetric_algorithms(&decoding)?;
        if let Some(only) = common.key_algorithm {
            let only = Algorithm::try_from(only).ok()?;
            algorithms.retain(|algorithm| *algorithm == only);
        }
        if algorithms.is_empty() {
            return None;
        }
        Some(Self::with(common.key_id.clone(), decoding, algorithms, checks))
    }

    fn with(id: Option<String>, decoding: DecodingKey, algorithms: Vec<Algorithm>, checks: &Validation) -> Self {
        Self { id, decoding, validation: Validation { algorithms, ..checks.clone() } }
    }

    pub fn allows(&self, algorithm: Algorithm) -> bool {
        self.validation.algorithms.contains(&algorithm)
    }
}

/// What a public key's own type allows; none when it is symmetric, malformed, too short or of a curve not supported.
fn asymmetric_algorithms(key: &DecodingKey) -> Option<Vec<Algorithm>> {
    #[expect(clippy::wildcard_enum_match_arm, reason = "the library may add types; none is supported until it is here")]
    match Jwk::from_decoding_key(key, None).ok()?.algorithm {
        // Base64 without padding: four characters for three bytes.
        AlgorithmParameters::RSA(rsa) if MODULUS_BYTES.contains(&(rsa.n.len() * 3 / 4)) => {
            Some(AlgorithmFamily::Rsa.algorithms().to_vec())
        }
        AlgorithmParameters::EllipticCurve(ec) if ec.curve == EllipticCurve::P256 => Some(vec![Algorithm::ES256]),
        AlgorithmParameters::EllipticCurve(ec) if ec.curve == EllipticCurve::P384 => Some(vec![Algorithm::ES384]),
        AlgorithmParameters::OctetKeyPair(_) => Some(vec![Algorithm::EdDSA]),
        _ => None,
    }
}
