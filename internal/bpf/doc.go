// Package bpf is the only place where Hearth talks to the kernel's eBPF. It holds small programs, written as instructions in
// Go so that no compiler is needed, and the readers of what they report.
//
// Programs attach to raw tracepoints alone: kprobes, fentry and BPF LSM are refused on some hosts that Hearth supports, and
// nothing may depend on tracefs being mounted. The places of kernel fields come from the kernel's own BTF, never from a table.
// What a host cannot do is told once, by Supported; callers then take their slower way.
package bpf
