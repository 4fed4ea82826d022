package prefetch

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
)

// Observe reads which pages of its files a process has mapped now. The process may be any, and may end meanwhile.
func Observe(pid uint32) (*Profile, error) {
	proc := "/proc/" + strconv.FormatUint(uint64(pid), 10)
	maps, err := os.Open(proc + "/maps")
	if err != nil {
		return nil, fmt.Errorf("observe process %d: %w", pid, err)
	}
	defer maps.Close()
	areas, err := parseMaps(maps)
	if err != nil {
		return nil, fmt.Errorf("observe process %d: %w", pid, err)
	}
	pages, err := os.Open(proc + "/pagemap")
	if err != nil {
		return nil, fmt.Errorf("observe process %d: %w", pid, err)
	}
	defer pages.Close()
	p := &Profile{Version: profileVersion, Starts: 1}
	at := map[string]int{}
	for _, a := range slices.Backward(areas) { // mappings go downwards: what was mapped first has the highest addresses
		present, err := a.present(pages)
		if err != nil {
			return nil, fmt.Errorf("observe process %d: %w", pid, err)
		}
		if len(present) == 0 {
			continue
		}
		i, ok := at[a.path]
		if !ok {
			i = len(p.Files)
			at[a.path] = i
			p.Files = append(p.Files, File{Path: a.path})
		}
		p.Files[i].Ranges = append(p.Files[i].Ranges, present...)
	}
	if len(p.Files) == 0 {
		return nil, fmt.Errorf("observe process %d: it has no file mapped", pid)
	}
	for i := range p.Files {
		p.Files[i].Ranges = union(p.Files[i].Ranges)
	}
	return p, nil
}

// area is a mapping of part of a file.
type area struct {
	start, end uint64
	offset     int64
	path       string
}

// maxAreas is some times what a process with thousands of libraries has.
const maxAreas = 65536

// parseMaps reads lines "START-END PERMS OFFSET DEVICE INODE PATH", of which the path may be anything that the process likes.
func parseMaps(r io.Reader) ([]area, error) {
	var areas []area
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 64<<10)
	for lines.Scan() {
		if a, ok := parseArea(lines.Text()); ok {
			areas = append(areas, a)
		}
		if len(areas) > maxAreas {
			return nil, fmt.Errorf("more than %d mappings", maxAreas)
		}
	}
	return areas, lines.Err()
}

// parseArea is false for what is no mapping of a file that has a name.
func parseArea(line string) (a area, ok bool) {
	fields := strings.SplitN(line, " ", 6)
	if len(fields) < 6 || fields[4] == "0" {
		return a, false
	}
	a.path = strings.TrimLeft(fields[5], " ")
	if !path.IsAbs(a.path) || path.Clean(a.path) != a.path || strings.HasSuffix(a.path, " (deleted)") || len(a.path) > maxPath {
		return a, false
	}
	low, high, _ := strings.Cut(fields[0], "-")
	offset, err := strconv.ParseInt(fields[2], 16, 64)
	if err != nil || offset < 0 {
		return a, false
	}
	a.offset = offset
	if a.start, err = strconv.ParseUint(low, 16, 64); err != nil {
		return a, false
	}
	if a.end, err = strconv.ParseUint(high, 16, 64); err != nil || a.end <= a.start || a.end-a.start > maxAreaBytes {
		return a, false
	}
	return a, true
}

// maxAreaBytes bounds what is looked up of one mapping: 8 bytes for each of its pages.
const maxAreaBytes = 4 << 30

// pagePresent is the bit of a pagemap entry that says that the page is in memory.
const pagePresent = 1 << 63

// present lists the parts of the file that the process has in memory.
func (a area) present(pagemap io.ReaderAt) ([]Range, error) {
	size := uint64(os.Getpagesize())
	entries := make([]byte, (a.end-a.start)/size*8)
	n, err := pagemap.ReadAt(entries, int64(a.start/size*8))
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	var ranges []Range
	for i := 0; i+8 <= n; i += 8 {
		if binary.NativeEndian.Uint64(entries[i:])&pagePresent == 0 {
			continue
		}
		at := a.offset + int64(i/8)*int64(size)
		if last := len(ranges) - 1; last >= 0 && ranges[last].Offset+ranges[last].Length == at {
			ranges[last].Length += int64(size)
		} else {
			ranges = append(ranges, Range{at, int64(size)})
		}
	}
	return ranges, nil
}
