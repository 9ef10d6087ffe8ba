//! Whether and how spans are exported: the standard variables of OpenTelemetry.
//!
//! They are the standard's own and no settings of this service, because platforms give them to every process they run.
//! For the same reason a mistake in one is a warning: nobody who cannot be traced should be unable to buy. What else the
//! standard has (`OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_EXPORTER_OTLP_HEADERS`, `OTEL_BSP_…`) is read by
//! the exporter itself.

use std::{collections::BTreeMap, ffi::OsString, time::Duration};

use super::{SecretUrl, value};

/// What becomes of spans.
#[derive(Debug, Clone, PartialEq)]
pub struct Traces {
    /// Where they are sent; may hold a password.
    pub endpoint: SecretUrl,
    /// How many of those are sampled for which no caller decides, from 0 to 1.
    pub share: f64,
    /// Whether a caller that names its trace decides for it.
    pub heeds_parent: bool,
    /// The limit of one export.
    pub timeout: Duration,
}

/// The standard's default.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The only protocol that is spoken.
const PROTOCOL: &str = "http/protobuf";

/// The standard's variables, those that are set and not empty.
struct Variables<'a>(BTreeMap<&'a str, &'a str>);

impl Variables<'_> {
    /// The variable and its value, the first of these that is set.
    fn first<'n>(&self, names: &[&'n str]) -> Option<(&'n str, &str)> {
        names.iter().find_map(|name| self.0.get(name).map(|value| (*name, *value)))
    }

    fn is(&self, name: &str, word: &str) -> bool {
        self.0.get(name).is_some_and(|value| value.eq_ignore_ascii_case(word))
    }
}

/// Reads them; what is odd is added to `warnings`. `None` when nothing is to be exported. `able` is a build that can.
pub(super) fn traces(env: &[(OsString, OsString)], able: bool, warnings: &mut Vec<String>) -> Option<Traces> {
    let set = env.iter().filter_map(|(name, value)| Some((name.to_str()?, value.to_str()?.trim())));
    let set = Variables(set.filter(|(name, value)| name.starts_with("OTEL_") && !value.is_empty()).collect());
    let (name, url) = set.first(&["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"])?;
    if set.is("OTEL_SDK_DISABLED", "true") || set.is("OTEL_TRACES_EXPORTER", "none") {
        return None;
    }
    if !able {
        warnings.push(format!("{name} is set, and no spans are exported: this build is without the feature otlp"));
        return None;
    }
    let endpoint = match value::url(url, &["http", "https"]) {
        Ok(_) if name == "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT" => SecretUrl::new(url),
        Ok(_) => SecretUrl::new(format!("{}/v1/traces", url.trim_end_matches('/'))),
        Err(error) => {
            warnings.push(format!("{name}: {error}; no spans are exported"));
            return None;
        }
    };
    if let Some((name, protocol)) = set.first(&["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"])
        && protocol != PROTOCOL
    {
        warnings.push(format!("{name}: spans are exported by {PROTOCOL}, the only protocol that seatlock speaks"));
    }
    let (share, heeds_parent) = sampler(&set, warnings);
    Some(Traces { endpoint, share, heeds_parent, timeout: timeout(&set, warnings) })
}

/// Which share is sampled, and whether callers are heeded.
fn sampler(set: &Variables<'_>, warnings: &mut Vec<String>) -> (f64, bool) {
    let name = set.0.get("OTEL_TRACES_SAMPLER").map_or("parentbased_always_on".to_owned(), |name| name.to_lowercase());
    let (heeds_parent, name) = name.strip_prefix("parentbased_").map_or((false, name.as_str()), |rest| (true, rest));
    match name {
        "always_on" => (1.0, heeds_parent),
        "always_off" => (0.0, heeds_parent),
        "traceidratio" => {
            let share = set.0.get("OTEL_TRACES_SAMPLER_ARG").map_or(Ok(1.0), |text| text.parse::<f64>());
            let share = share.ok().filter(|share| (0.0..=1.0).contains(share)).unwrap_or_else(|| {
                warnings
                    .push("OTEL_TRACES_SAMPLER_ARG: must be a number from 0 to 1; everything is sampled".to_owned());
                1.0
            });
            (share, heeds_parent)
        }
        _ => {
            warnings.push(
                "OTEL_TRACES_SAMPLER: must be always_on, always_off or traceidratio, each also with parentbased_ before it; \
                 taken as parentbased_always_on"
                    .to_owned(),
            );
            (1.0, true)
        }
    }
}

fn timeout(set: &Variables<'_>, warnings: &mut Vec<String>) -> Duration {
    let given = set.first(&["OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT"]);
    let Some((name, text)) = given else { return TIMEOUT };
    let ms = text.parse().ok().filter(|ms| (1..=600_000).contains(ms));
    if ms.is_none() {
        warnings.push(format!("{name}: must be milliseconds, at most 600000; taken as 10000"));
    }
    ms.map_or(TIMEOUT, Duration::from_millis)
}

#[cfg(test)]
mod tests {
    use super::*;

    const URL: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318/");

    fn read_by(able: bool, set: &[(&str, &str)]) -> (Option<Traces>, Vec<String>) {
        let env: Vec<_> = set.iter().map(|(name, value)| (OsString::from(name), OsString::from(value))).collect();
        let mut warnings = Vec::new();
        (traces(&env, able, &mut warnings), warnings)
    }

    fn read(set: &[(&str, &str)]) -> (Option<Traces>, Vec<String>) {
        read_by(true, set)
    }

    #[test]
    fn nothing_set_is_nothing_exported() {
        for set in [
            &[][..],
            &[("OTEL_SERVICE_NAME", "x"), ("OTEL_TRACES_SAMPLER", "no such")],
            &[("OTEL_EXPORTER_OTLP_ENDPOINT", " ")],
            &[URL, ("OTEL_SDK_DISABLED", "TRUE")],
            &[URL, ("OTEL_TRACES_EXPORTER", "none")],
        ] {
            for able in [false, true] {
                assert_eq!(read_by(able, set), (None, vec![]), "{set:?}");
            }
        }
    }

    #[test]
    fn a_build_that_cannot_export_says_so() {
        let (traces, warnings) = read_by(false, &[URL]);
        assert_eq!(traces, None);
        let said =
            "OTEL_EXPORTER_OTLP_ENDPOINT is set, and no spans are exported: this build is without the feature otlp";
        assert_eq!(warnings, [said]);
    }

    #[test]
    fn the_endpoint_of_traces_goes_before_the_common_one() {
        for (set, endpoint) in [
            (&[URL][..], "http://collector:4318/v1/traces"),
            (&[URL, ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https://t/x")], "https://t/x"),
        ] {
            let (traces, warnings) = read(set);
            let endpoint = SecretUrl::new(endpoint);
            assert_eq!(traces, Some(Traces { endpoint, share: 1.0, heeds_parent: true, timeout: TIMEOUT }));
            assert_eq!(warnings, [""; 0]);
        }
        let (traces, warnings) = read(&[("OTEL_EXPORTER_OTLP_ENDPOINT", "hunter2@collector")]);
        assert_eq!(traces, None);
        let said =
            "OTEL_EXPORTER_OTLP_ENDPOINT: must be a URL of the form http://HOST, https://HOST; no spans are exported";
        assert_eq!(warnings, [said]);
    }

    #[test]
    fn samplers_are_the_standards() {
        for (name, share, sampled, heeds_parent) in [
            ("always_on", "0.5", 1.0, false),
            ("always_off", "", 0.0, false),
            ("traceidratio", "0.25", 0.25, false),
            ("parentbased_always_on", "", 1.0, true),
            ("parentbased_always_off", "", 0.0, true),
            ("PARENTBASED_TRACEIDRATIO", "0", 0.0, true),
            ("parentbased_traceidratio", "", 1.0, true),
        ] {
            let (traces, warnings) = read(&[URL, ("OTEL_TRACES_SAMPLER", name), ("OTEL_TRACES_SAMPLER_ARG", share)]);
            let traces = traces.expect("it exports");
            assert!((traces.share - sampled).abs() < f64::EPSILON && traces.heeds_parent == heeds_parent, "{name}");
            assert_eq!(warnings, [""; 0], "{name}");
        }
    }

    #[test]
    fn a_mistake_is_told_and_stops_nothing() {
        for (name, value) in [
            ("OTEL_TRACES_SAMPLER", "jaeger_remote"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s"),
        ] {
            let (traces, warnings) = read(&[URL, (name, value)]);
            let (endpoint, timeout) = (SecretUrl::new("http://collector:4318/v1/traces"), TIMEOUT);
            assert_eq!(traces, Some(Traces { endpoint, share: 1.0, heeds_parent: true, timeout }), "{name}");
            assert!(warnings.len() == 1 && warnings[0].starts_with(name), "{warnings:?}");
        }
        for share in ["2", "-1", "NaN", "all"] {
            let ratio = ("OTEL_TRACES_SAMPLER", "traceidratio");
            let (traces, warnings) = read(&[URL, ratio, ("OTEL_TRACES_SAMPLER_ARG", share)]);
            assert!(traces.is_some_and(|traces| traces.share > 0.99), "{share}");
            assert_eq!(warnings.len(), 1, "{warnings:?}");
        }
    }
}
