//! Names on a Prometheus scrape endpoint, made from OpenTelemetry names by the rules of the OpenTelemetry specification
//! ("Prometheus and OpenMetrics Compatibility", section "Metric Metadata"). Used by [`crate::Metric::prometheus_name`] only.

use crate::{Definition, Kind, Unit};

/// The converted name: dots to underscores, the unit spelled out as a suffix unless the name has it already, `_total` for sums.
pub(crate) fn name(definition: &Definition) -> String {
    let mut name = definition.name.replace('.', "_");
    let suffix = match definition.unit {
        Unit::Bytes => "bytes",
        Unit::Seconds => "seconds",
        // The rule names a gauge of unit 1 a ratio; what is not a ratio (a state, a count) would be told wrongly by it.
        Unit::One if definition.name.ends_with("utilization") => "ratio",
        // A unit in braces is an annotation and is dropped.
        _ => "",
    };
    if !suffix.is_empty() && !name.split('_').any(|word| word == suffix) {
        name.push('_');
        name.push_str(suffix);
    }
    if definition.kind == Kind::Counter {
        name.push_str("_total");
    }
    name
}

#[cfg(test)]
mod tests {
    use crate::Metric;

    #[test]
    fn names_follow_the_rules_of_conversion() {
        for (metric, name) in [
            (Metric::CpuUtilization, "microsandbox_cpu_utilization_ratio"),
            (Metric::MemoryUsage, "microsandbox_memory_usage_bytes"),
            (Metric::DiskBytesRead, "microsandbox_disk_bytes_read"),
            (Metric::NetworkIo, "microsandbox_network_io_bytes_total"),
            (Metric::NetworkPackets, "microsandbox_network_packets_total"),
            (Metric::CpuTime, "microsandbox_cpu_time_seconds_total"),
            (Metric::State, "microsandbox_state"),
            (Metric::LastSuccess, "microsandbox_collector_last_success_timestamp_seconds"),
        ] {
            assert_eq!(metric.prometheus_name(), name);
        }
    }
}
