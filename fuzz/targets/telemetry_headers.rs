#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| seatlock::fuzzing::run("telemetry_headers", data));
