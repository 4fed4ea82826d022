package host

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// lowMemory is the part of the memory that has to be available where the kernel does not tell of pressure.
const lowMemory = 1.0 / 16

// ShortOfMemory tells whether the machine's programs wait for memory: whether some have, for that part of the last ten seconds, in
// percent; where the kernel does not say so (PSI), whether less than 1/16 of it is available. proc is /proc.
func ShortOfMemory(proc string, percent float64) (bool, error) {
	text, err := os.ReadFile(filepath.Join(proc, "pressure", "memory"))
	if err == nil {
		if some, ok := stall(text); ok {
			return some >= percent, nil
		}
	}
	text, err = os.ReadFile(filepath.Join(proc, "meminfo"))
	if err != nil {
		return false, err
	}
	available, total := memInfo(text, "MemAvailable"), memInfo(text, "MemTotal")
	if total == 0 {
		return false, fmt.Errorf("%s says nothing of MemTotal", filepath.Join(proc, "meminfo"))
	}
	return float64(available) < lowMemory*float64(total), nil
}

// stall reads of /proc/pressure/memory which part of the last ten seconds, in percent, some process has waited for memory. See
// Documentation/accounting/psi.rst of Linux.
func stall(text []byte) (percent float64, ok bool) {
	for line := range bytes.Lines(text) {
		fields := strings.Fields(string(line))
		if len(fields) < 2 || fields[0] != "some" {
			continue
		}
		value, found := strings.CutPrefix(fields[1], "avg10=")
		percent, err := strconv.ParseFloat(value, 64)
		return percent, found && err == nil && percent >= 0
	}
	return 0, false
}

// memInfo reads a number of bytes of /proc/meminfo; 0 if it is not there.
func memInfo(text []byte, key string) int64 {
	for line := range bytes.Lines(text) {
		name, value, ok := strings.Cut(string(line), ":")
		if !ok || name != key {
			continue
		}
		n, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
		if err != nil || n < 0 || n > 1<<50 {
			return 0
		}
		return n << 10
	}
	return 0
}

// MemoryBytes is how much memory the machine has.
func MemoryBytes(proc string) (int64, error) {
	text, err := os.ReadFile(filepath.Join(proc, "meminfo"))
	if err != nil {
		return 0, err
	}
	return memInfo(text, "MemTotal"), nil
}
