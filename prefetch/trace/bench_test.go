package trace_test

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"
)

// BenchmarkOverhead is what a child takes that reads 2,000 files, in memory, by read and by mmap, recorded and not: ns/op of the two
// are to be compared. The worst case of a start: it does nothing else.
func BenchmarkOverhead(b *testing.B) {
	group := cgroup(b, someHierarchy(b), "hearth-trace-overhead")
	root := b.TempDir()
	var args []string
	for i := range 2000 {
		path := filepath.Join(root, strconv.Itoa(i))
		if err := os.WriteFile(path, make([]byte, 64*page), 0o644); err != nil {
			b.Fatal(err)
		}
		args = append(args, []string{"read=", "mmap=", "pread="}[i%3]+path)
	}
	tr := newTracer(b)
	for _, recorded := range []string{"none", "others", "self"} {
		b.Run("recorded="+recorded, func(b *testing.B) {
			at := map[string]string{"others": cgroup(b, group, "others"), "self": group}[recorded]
			if at != "" {
				r := begin(b, tr, []string{at}, []string{root})
				defer func() {
					got, err := r.End()
					if err != nil || got.Lost > 0 {
						b.Errorf("lost %d, %v", got.Lost, err)
					}
				}()
			}
			for b.Loop() {
				child(b, []string{group}, args...)
			}
		})
	}
}

// BenchmarkBegin is what a start waits for, of a recording that is the only one, some time after the last: right after it, the kernel
// would first have to be sure that nobody runs the programs that were detached.
func BenchmarkBegin(b *testing.B) {
	group := cgroup(b, someHierarchy(b), "hearth-trace-begin")
	root := b.TempDir()
	tr := newTracer(b)
	for b.Loop() {
		r := begin(b, tr, []string{group}, []string{root})
		b.StopTimer()
		end(b, r)
		time.Sleep(100 * time.Millisecond)
		b.StartTimer()
	}
}
