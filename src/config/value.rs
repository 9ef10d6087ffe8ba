//! How the text of a setting becomes its value. No error repeats the text: it may be a secret in the wrong place.

use std::{
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    time::Duration,
};

use super::{Rate, SecretUrl};

/// An address to listen on.
pub(super) fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "must be an IP address and a port, such as 0.0.0.0:8880 or [::]:8880".to_owned())
}

/// A duration with its unit, within bounds.
pub(super) fn duration(text: &str, bounds: &RangeInclusive<Duration>) -> Result<Duration, String> {
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err("needs a unit: write 50ms, 30s, 5m or 1h30m".to_owned());
    }
    let value =
        humantime::parse_duration(text).map_err(|_| "must be a duration such as 50ms, 30s, 5m or 1h30m".to_owned())?;
    if bounds.contains(&value) {
        return Ok(value);
    }
    let format = |bound: &Duration| humantime::format_duration(*bound).to_string();
    Err(format!("must be between {} and {}", format(bounds.start()), format(bounds.end())))
}

/// An integer within bounds.
pub(super) fn integer(text: &str, bounds: &RangeInclusive<u32>) -> Result<u32, String> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    match text.parse() {
        Ok(value) if digits && bounds.contains(&value) => Ok(value),
        _ => Err(format!("must be an integer between {} and {}", bounds.start(), bounds.end())),
    }
}

/// A switch.
pub(super) fn switch(text: &str) -> Result<bool, String> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "1" => Ok(true),
        "false" | "no" | "off" | "0" => Ok(false),
        _ => Err("must be true or false".to_owned()),
    }
}

/// `10/s burst 20`, `10/s` (then the burst is what one unit of time allows), `600/m burst 20`, or `off`.
pub(super) fn rate(text: &str) -> Result<Option<Rate>, String> {
    let shape = || "must look like '10/s burst 20', '600/m burst 20', '10/s', or be 'off'".to_owned();
    let words: Vec<&str> = text.split_whitespace().collect();
    let (rate, burst) = match *words.as_slice() {
        ["off"] => return Ok(None),
        [rate] => (rate, None),
        [rate, "burst", burst] => (rate, Some(burst)),
        _ => return Err(shape()),
    };
    let (count, unit) = rate.split_once('/').ok_or_else(shape)?;
    let unit = match unit {
        "s" => Duration::from_secs(1),
        "m" => Duration::from_mins(1),
        "h" => Duration::from_hours(1),
        _ => return Err(shape()),
    };
    // Up to a million per second, because the ledger counts intervals in microseconds.
    let number = |text: &str| integer(text, &(1..=1_000_000)).map_err(|error| format!("each number {error}"));
    let count = number(count)?;
    let burst = burst.map_or(Ok(count), number)?;
    Ok(Some(Rate { interval: unit / count, burst }))
}

/// Web origins separated by commas, or `*` for any.
pub(super) fn origins(text: &str) -> Result<Vec<String>, String> {
    text.split(',').map(str::trim).filter(|origin| !origin.is_empty()).map(origin).collect()
}

/// Ranges of addresses separated by commas, such as `10.0.0.0/8`; a bare address is a range of one.
pub(super) fn ranges(text: &str) -> Result<Vec<(IpAddr, u8)>, String> {
    text.split(',').map(str::trim).filter(|range| !range.is_empty()).map(range).collect()
}

fn range(text: &str) -> Result<(IpAddr, u8), String> {
    let shape = || "must be addresses or ranges such as 10.0.0.0/8 or fd00::/8, separated by commas".to_owned();
    let (base, bits) = text.split_once('/').map_or((text, None), |(base, bits)| (base, Some(bits)));
    let base: IpAddr = base.parse().map_err(|_| shape())?;
    let width = if base.is_ipv4() { 32 } else { 128 };
    let bits = bits.map_or(Ok(width), |bits| integer(bits, &(0..=width)).map_err(|_| shape()))?;
    Ok((base, u8::try_from(bits).map_err(|_| shape())?))
}

fn origin(text: &str) -> Result<String, String> {
    let shape = || "must be origins such as https://shop.example, separated by commas, or *".to_owned();
    if text == "*" {
        return Ok(text.to_owned());
    }
    let url = url::Url::parse(text).map_err(|_| shape())?;
    if !matches!(url.scheme(), "http" | "https") || !is_bare(&url) {
        return Err(shape());
    }
    Ok(url.origin().ascii_serialization())
}

/// Whether a URL says scheme, host and port, and nothing else.
fn is_bare(url: &url::Url) -> bool {
    matches!(url.path(), "" | "/")
        && url.query().is_none()
        && url.fragment().is_none()
        && url.username().is_empty()
        && url.password().is_none()
}

/// A URL of one of `schemes`: with a host for network schemes, with a path for `unix:` and `file:`.
pub(super) fn url(text: &str, schemes: &[&str]) -> Result<SecretUrl, String> {
    let Some((scheme, rest)) = text.split_once(':').filter(|(scheme, _)| schemes.contains(scheme)) else {
        let written: Vec<String> = schemes
            .iter()
            .map(|scheme| if is_local(scheme) { format!("{scheme}:PATH") } else { format!("{scheme}://HOST") })
            .collect();
        return Err(format!("must be a URL of the form {}", written.join(", ")));
    };
    if is_local(scheme) {
        if rest.is_empty() || rest == "//" {
            return Err(format!("names no path: write {scheme}:PATH"));
        }
        return Ok(SecretUrl::new(text));
    }
    let parsed = url::Url::parse(text)
        .map_err(|error| format!("is not a URL: {error} (special characters of a password are written as %XX)"))?;
    if !rest.starts_with("//") || parsed.host_str().is_none_or(str::is_empty) {
        return Err(format!("names no host: write {scheme}://HOST"));
    }
    if scheme == "tcp" && (parsed.port().is_none() || !is_bare(&parsed)) {
        return Err("must be just tcp://HOST:PORT".to_owned());
    }
    Ok(SecretUrl::new(text))
}

fn is_local(scheme: &str) -> bool {
    matches!(scheme, "unix" | "file")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_needs_a_unit_and_keeps_its_bounds() {
        let bounds = Duration::from_millis(1)..=Duration::from_hours(1);
        assert_eq!(duration("50ms", &bounds), Ok(Duration::from_millis(50)));
        assert_eq!(duration("1m 30s", &bounds), Ok(Duration::from_secs(90)));
        assert_eq!(duration("1h", &bounds), Ok(Duration::from_hours(1)));
        for (text, error) in [
            ("300", "needs a unit: write 50ms, 30s, 5m or 1h30m"),
            ("0", "needs a unit: write 50ms, 30s, 5m or 1h30m"),
            ("5 minuten", "must be a duration such as 50ms, 30s, 5m or 1h30m"),
            ("-5s", "must be a duration such as 50ms, 30s, 5m or 1h30m"),
            ("99999999999999999999s", "must be a duration such as 50ms, 30s, 5m or 1h30m"),
            ("2h", "must be between 1ms and 1h"),
            ("0s", "must be between 1ms and 1h"),
        ] {
            assert_eq!(duration(text, &bounds), Err(error.to_owned()), "{text}");
        }
    }

    #[test]
    fn a_rate_is_a_steady_interval_and_a_burst() {
        let rate_of = |ms, burst| Ok(Some(Rate { interval: Duration::from_millis(ms), burst }));
        assert_eq!(rate("10/s burst 20"), rate_of(100, 20));
        assert_eq!(rate(" 10/s  burst 20 "), rate_of(100, 20));
        assert_eq!(rate("10/s"), rate_of(100, 10));
        assert_eq!(rate("600/m burst 20"), rate_of(100, 20));
        assert_eq!(rate("1/h burst 1"), rate_of(3_600_000, 1));
        assert_eq!(rate("off"), Ok(None));
        for text in ["10", "10/d", "0/s", "10/s burst 0", "10/s burst", "10/s:20", "-1/s", "1.5/s", "2000000/s", "on"] {
            assert!(rate(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_url_has_a_known_scheme_and_says_where() {
        let redis = ["redis", "unix"];
        assert_eq!(
            url("redis://:p%40ss@cache:6379/0", &redis).map(|url| url.to_string()),
            Ok("redis://***@cache:6379/0".to_owned())
        );
        assert!(url("unix:/run/redis.sock", &redis).is_ok());
        for (text, error) in [
            ("http://cache", "must be a URL of the form redis://HOST, unix:PATH"),
            ("cache:6379", "must be a URL of the form redis://HOST, unix:PATH"),
            ("redis:cache", "names no host: write redis://HOST"),
            ("redis://", "names no host: write redis://HOST"),
            ("unix:", "names no path: write unix:PATH"),
        ] {
            assert_eq!(url(text, &redis).map(|_| ()), Err(error.to_owned()), "{text}");
        }
        assert!(url("redis://:pa/ss@cache:6379", &redis).is_err());
        assert!(url("tcp://events:8879", &["tcp"]).is_ok());
        for text in ["tcp://events", "tcp://events:8879/path", "tcp://user@events:8879", "tcp://events:8879?queue=q"] {
            assert_eq!(url(text, &["tcp"]), Err("must be just tcp://HOST:PORT".to_owned()), "{text}");
        }
    }

    #[test]
    fn ranges_are_addresses_and_bits() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let expected = vec![(ip("10.0.0.0"), 8), (ip("192.0.2.7"), 32), (ip("fd00::"), 8), (ip("::1"), 128)];
        assert_eq!(ranges("10.0.0.0/8, 192.0.2.7,fd00::/8,::1,"), Ok(expected));
        for text in ["10.0.0.0/33", "fd00::/129", "10.0.0/8", "proxy", "10.0.0.0/", "10.0.0.0/-1", "10.0.0.0/8/8"] {
            assert!(ranges(text).is_err(), "{text}");
        }
    }

    #[test]
    fn origins_are_whole_and_bare() {
        assert_eq!(
            origins("https://a.example, http://b:3000/"),
            Ok(vec!["https://a.example".into(), "http://b:3000".into()])
        );
        assert_eq!(origins("*"), Ok(vec!["*".into()]));
        for text in ["a.example", "https://a.example/path", "https://u:p@a.example", "ftp://a", "null"] {
            assert!(origins(text).is_err(), "{text}");
        }
    }
}
