package layer_test

import (
	"archive/tar"
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/layer"
)

// syntheticTar is like the layer of a language: thousands of small text files, some libraries.
func syntheticTar(b testing.TB, files, large int) []byte {
	rnd := rand.New(rand.NewPCG(1, 2))
	words := make([]string, 4000)
	for i := range words {
		words[i] = fmt.Sprintf("%x", rnd.Uint64()>>(8*rnd.IntN(7)))
	}
	text := func(n int) string {
		var s strings.Builder
		for s.Len() < n {
			s.WriteString(words[int(float64(len(words))*rnd.Float64()*rnd.Float64()*rnd.Float64())])
			s.WriteByte(" \n=(.,"[rnd.IntN(6)])
		}
		return s.String()[:n]
	}
	var ents []ent
	for i := range files {
		if i%20 == 0 {
			ents = append(ents, dir(fmt.Sprintf("usr/lib/p%d", i/200), 0o755), dir(fmt.Sprintf("usr/lib/p%d/q%d", i/200, i/20), 0o755))
		}
		n := int(rnd.ExpFloat64() * 9000)
		ents = append(ents, file(fmt.Sprintf("usr/lib/p%d/q%d/module_%d.py", i/200, i/20, i), text(n)))
	}
	for i := range large {
		ents = append(ents, file(fmt.Sprintf("usr/lib/lib%d.so", i), text(4<<20+rnd.IntN(12<<20))))
	}
	return makeTar(b, ents...)
}

// benchDir prefers memory, so that the disk is not what is measured. HEARTH_BENCH_DIR names another place.
func benchDir(b *testing.B) string {
	if dir := os.Getenv("HEARTH_BENCH_DIR"); dir != "" {
		return dir
	}
	if _, err := os.Stat("/dev/shm"); err == nil {
		return "/dev/shm"
	}
	return b.TempDir()
}

func BenchmarkUnpack(b *testing.B) {
	tarball := syntheticTar(b, 8000, 12)
	if name := os.Getenv("HEARTH_BENCH_TAR"); name != "" {
		var err error
		if tarball, err = os.ReadFile(name); err != nil {
			b.Fatal(err)
		}
	}
	entries := 0
	for r := tar.NewReader(bytes.NewReader(tarball)); ; entries++ {
		if _, err := r.Next(); err != nil {
			break
		}
	}
	blobs := map[string][]byte{}
	for _, format := range []layer.Format{layer.Tar, layer.LZ4, layer.Zstd, layer.Gzip} {
		blobs[format.String()] = compress(b, format, tarball)
	}
	for _, e := range encodings {
		blobs[string(e)+"-sibling"] = encode(b, e, tarball)
	}
	for _, name := range slices.Sorted(maps.Keys(blobs)) {
		blob := blobs[name]
		for form, unpack := range forms {
			b.Run(name+"/"+form, func(b *testing.B) {
				b.SetBytes(int64(len(tarball)))
				u := newUnpacker(b, layer.Config{})
				spec := specOf(blob, tarball)
				var last *layer.Result
				var cpu time.Duration
				for i := 0; b.Loop(); i++ {
					b.StopTimer()
					into := filepath.Join(benchDir(b), fmt.Sprintf("hearth-bench-%d", os.Getpid()))
					if err := os.Mkdir(into, 0o755); err != nil {
						b.Fatal(err)
					}
					b.StartTimer()
					cpu -= cpuTime(b)
					res, err := unpack(u, b.Context(), bytes.NewReader(blob), spec, into)
					b.StopTimer()
					cpu += cpuTime(b)
					if err != nil {
						b.Fatal(err)
					}
					last = res
					if err := os.RemoveAll(into); err != nil {
						b.Fatal(err)
					}
					b.StartTimer()
				}
				t := last.Timings
				for name, s := range map[string]layer.Stage{"digest": t.Digest, "decompress": t.Decompress, "diffid": t.DiffID, "tar": t.Tar, "write": t.Write} {
					b.ReportMetric(float64(s.Busy.Milliseconds()), name+"-ms")
				}
				b.ReportMetric(float64(entries), "entries")
				// On a busy machine this says more than the time on the wall.
				b.ReportMetric(float64(cpu.Milliseconds())/float64(b.N), "cpu-ms/op")
				b.ReportMetric(float64(last.Bytes)/(1<<20), "disk-MiB")
			})
		}
	}
}

func cpuTime(b *testing.B) time.Duration {
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		b.Fatal(err)
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}
