package layer_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"
	"testing/synctest"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"

	"github.com/hearth-serverless/hearth/layer"
)

var encodings = []layer.Encoding{layer.EncodingZstd, layer.EncodingLZ4}

func encode(t testing.TB, e layer.Encoding, data []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := layer.NewEncoder(&out, e)
	if err != nil {
		t.Fatal(err)
	}
	must(t, w.Close, w, data)
	return out.Bytes()
}

// decodeElsewhere decodes with the ordinary decoder of a format.
func decodeElsewhere(t testing.TB, e layer.Encoding, blob []byte) []byte {
	t.Helper()
	var r io.Reader = lz4.NewReader(bytes.NewReader(blob))
	if e == layer.EncodingZstd {
		z, err := zstd.NewReader(bytes.NewReader(blob))
		if err != nil {
			t.Fatal(err)
		}
		defer z.Close()
		r = z
	}
	out, err := io.ReadAll(r)
	if err != nil {
		t.Fatalf("an ordinary %s decoder: %v", e, err)
	}
	return out
}

// mixed is text, noise and zeros.
func mixed(n int) []byte {
	rnd := rand.New(rand.NewPCG(7, uint64(n)))
	out := make([]byte, n)
	for i := 0; i < n; {
		m := min(n-i, 1+rnd.IntN(300_000))
		switch part := out[i : i+m]; rnd.IntN(3) {
		case 0:
			for j := range part {
				part[j] = "the quick brown fox "[(j*j+j/7)%20]
			}
		case 1:
			for j := range part {
				part[j] = byte(rnd.Uint32())
			}
		}
		i += m
	}
	return out
}

func TestEncoder(t *testing.T) {
	for _, e := range encodings {
		for _, n := range []int{1, 511, layer.FrameBytes - 1, layer.FrameBytes, layer.FrameBytes + 1, 3*layer.FrameBytes + 77} {
			data := mixed(n)
			blob := encode(t, e, data)
			if !bytes.Equal(decodeElsewhere(t, e, blob), data) {
				t.Errorf("%s of %d bytes: an ordinary decoder gets something else", e, n)
			}
			if !bytes.Equal(encode(t, e, data), blob) {
				t.Errorf("%s of %d bytes: encoding it again gives something else", e, n)
			}
			spec := specOf(blob, data)
			spec.Indexed = true
			var out bytes.Buffer
			got, err := newUnpacker(t, layer.Config{}).Decompress(t.Context(), iotest.HalfReader(bytes.NewReader(blob)), spec, &out)
			if err != nil || got != int64(n) || !bytes.Equal(out.Bytes(), data) {
				t.Errorf("%s of %d bytes: decompressed %d bytes, error %v", e, n, got, err)
			}
		}
	}
	if _, err := layer.NewEncoder(io.Discard, "brotli"); err == nil {
		t.Error("an encoding of another name was accepted")
	}
}

// TestEncoderFails has a writer that fails at some byte, and an Encoder that is given up. A goroutine of either that is left over fails
// the test as a deadlock of its bubble.
func TestEncoderFails(t *testing.T) {
	errFull := errors.New("full")
	data := mixed(4 * layer.FrameBytes)
	synctest.Test(t, func(t *testing.T) {
		for _, at := range []int{0, 1, 70_000, 300_000} {
			w, err := layer.NewEncoder(&failingWriter{left: at, err: errFull}, layer.EncodingLZ4)
			if err != nil {
				t.Fatal(err)
			}
			_, werr := w.Write(data)
			if err := w.Close(); !errors.Is(err, errFull) || werr != nil && !errors.Is(werr, errFull) {
				t.Errorf("writer fails at %d: Write %v, Close %v", at, werr, err)
			}
		}
		w, err := layer.NewEncoder(io.Discard, layer.EncodingZstd)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = w.Write(data)
		w.Abort()
	})
}

type failingWriter struct {
	left int
	err  error
}

func (w *failingWriter) Write(p []byte) (int, error) {
	if w.left -= len(p); w.left < 0 {
		return 0, w.err
	}
	return len(p), nil
}

func TestDecompress(t *testing.T) {
	tarball := someTar(t)
	u := newUnpacker(t, layer.Config{MemoryBytes: 16 << 20})
	for _, format := range []layer.Format{layer.Tar, layer.Gzip, layer.Zstd, layer.LZ4} {
		blob := compress(t, format, tarball)
		var out bytes.Buffer
		if n, err := u.Decompress(t.Context(), bytes.NewReader(blob), specOf(blob, tarball), &out); err != nil || n != int64(out.Len()) || !bytes.Equal(out.Bytes(), tarball) {
			t.Errorf("%s: %d bytes, error %v", format, n, err)
		}
		wrong := specOf(blob, tarball)
		wrong.DiffID = specOf(nil, nil).Digest
		if _, err := u.Decompress(t.Context(), bytes.NewReader(blob), wrong, io.Discard); !errors.Is(err, layer.ErrCorrupt) {
			t.Errorf("%s with a wrong diffID: error %v", format, err)
		}
		errFull := errors.New("full")
		if _, err := u.Decompress(t.Context(), bytes.NewReader(blob), specOf(blob, tarball), &failingWriter{err: errFull}); !errors.Is(err, errFull) {
			t.Errorf("%s into a writer that fails: error %v", format, err)
		}
	}
}

// TestForeignFrames decompresses frames that are not our Encoder's: with and without a size, small, large, with checksums.
func TestForeignFrames(t *testing.T) {
	tarball := makeTar(t, file("noise", string(mixed(2<<20))), file("text", strings.Repeat("some text ", 200_000)))
	zstdAll := func(size int, opts ...zstd.EOption) []byte {
		z, err := zstd.NewWriter(nil, opts...)
		if err != nil {
			t.Fatal(err)
		}
		var out []byte
		for rest := tarball; len(rest) > 0; {
			n := min(size, len(rest))
			out, rest = z.EncodeAll(rest[:n], out), rest[n:]
		}
		return out
	}
	zstdStreams := func(size int) []byte { // their frames do not say their size
		var out bytes.Buffer
		z, err := zstd.NewWriter(nil) // one for all: to make one takes longer than to use it
		if err != nil {
			t.Fatal(err)
		}
		for rest := tarball; len(rest) > 0; {
			n := min(size, len(rest))
			z.Reset(&out)
			for part := rest[:n]; len(part) > 0; part = part[min(len(part), 10_000):] {
				_, _ = z.Write(part[:min(len(part), 10_000)])
			}
			if err := z.Close(); err != nil {
				t.Fatal(err)
			}
			rest = rest[n:]
		}
		return out.Bytes()
	}
	lz4FramesOf := func(rest []byte, size int, opts ...lz4.Option) []byte {
		var out bytes.Buffer
		w := lz4.NewWriter(nil)
		for len(rest) > 0 {
			n := min(size, len(rest))
			w.Reset(&out)
			if err := w.Apply(append(opts, lz4.SizeOption(uint64(n)))...); err != nil {
				t.Fatal(err)
			}
			must(t, w.Close, w, rest[:n])
			rest = rest[n:]
		}
		return out.Bytes()
	}
	lz4Frames := func(size int, opts ...lz4.Option) []byte { return lz4FramesOf(tarball, size, opts...) }
	skippable := []byte{0x5e, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 'a', 'b', 'c'} // an index's magic, and no index
	half := len(tarball) / 2
	blobs := map[string][]byte{
		"zstd, tiny frames": zstdAll(1000), "zstd, 100 KiB": zstdAll(100 << 10), "zstd, 512 KiB": zstdAll(512 << 10),
		"zstd, 700 KiB": zstdAll(700 << 10), "zstd, 3 MiB": zstdAll(3 << 20), "zstd, checksums": zstdAll(300<<10, zstd.WithEncoderCRC(true)),
		"zstd, single segment": zstdAll(400<<10, zstd.WithSingleSegment(true)),
		"zstd, streams of 100": zstdStreams(100 << 10), "zstd, streams of 600": zstdStreams(600 << 10),
		"zstd, skippable between": append(append(append(bytes.Clone(skippable), zstdAll(1<<30)...), skippable...), skippable...),
		"lz4, 64 KiB":             lz4Frames(512<<10, lz4.BlockSizeOption(lz4.Block64Kb)), "lz4, 4 MiB": lz4Frames(8 << 20),
		"lz4, checksums": lz4Frames(512<<10, lz4.ChecksumOption(true), lz4.BlockChecksumOption(true)),
		"lz4, tiny":      lz4Frames(900, lz4.BlockSizeOption(lz4.Block64Kb)),
		// Their writer takes 10 ms for each with blocks of 4 MiB, so there are not many.
		"lz4, tiny, of large blocks": append(lz4FramesOf(tarball[:90_000], 900), lz4FramesOf(tarball[90_000:], 512<<10)...), "lz4, then large": append(compressLZ4(t, tarball[:half], lz4.SizeOption(uint64(half))), compressLZ4(t, tarball[half:])...),
		"lz4, legacy": compressLZ4(t, tarball, lz4.LegacyOption(true)),
	}
	for name, blob := range blobs {
		t.Run(name, func(t *testing.T) {
			u := newUnpacker(t, layer.Config{MemoryBytes: 4 << 20}) // next to nothing: a block that is held too long stops it
			for memory := int64(8 << 20); memory <= 32<<20; memory *= 2 {
				_, err := u.Decompress(t.Context(), bytes.NewReader(blob), specOf(blob, tarball), io.Discard)
				if !errors.Is(err, layer.ErrTooLarge) {
					break
				}
				u = newUnpacker(t, layer.Config{MemoryBytes: memory})
			}
			for _, src := range []io.Reader{bytes.NewReader(blob), iotest.HalfReader(bytes.NewReader(blob))} {
				var out bytes.Buffer
				if _, err := u.Decompress(t.Context(), src, specOf(blob, tarball), &out); err != nil || !bytes.Equal(out.Bytes(), tarball) {
					t.Fatalf("decompressed %d bytes of %d, error %v", out.Len(), len(tarball), err)
				}
			}
			for _, cut := range []int{1, 5, len(blob) / 3} {
				short := blob[:len(blob)-cut]
				if _, err := u.Decompress(t.Context(), bytes.NewReader(short), specOf(short, tarball), io.Discard); !errors.Is(err, layer.ErrCorrupt) {
					t.Errorf("cut off by %d: error %v", cut, err)
				}
			}
		})
	}
}

func compressLZ4(t testing.TB, data []byte, opts ...lz4.Option) []byte {
	t.Helper()
	var out bytes.Buffer
	w := lz4.NewWriter(&out)
	if err := w.Apply(opts...); err != nil {
		t.Fatal(err)
	}
	must(t, w.Close, w, data)
	return out.Bytes()
}

// TestIndexLies has blobs whose tar is right, and whose index is not.
func TestIndexLies(t *testing.T) {
	tarball := makeTar(t, file("noise", string(mixed(3*layer.FrameBytes))))
	frames := len(tarball)/layer.FrameBytes + 1
	tail := 8 + 8*frames + 9
	for _, e := range encodings {
		good := encode(t, e, tarball)
		at := func(off int) func([]byte) []byte {
			return func(b []byte) []byte { b[len(b)-off]++; return b }
		}
		index := good[len(good)-tail:]
		cases := map[string]func([]byte) []byte{
			"footer's magic": at(1), "descriptor": func(b []byte) []byte { b[len(b)-5] = 4; return b }, "count": at(9), "last frame's content": at(10), "last frame's size": at(14),
			"first frame's size": at(tail - 8), "length": at(tail - 4),
			"none": func(b []byte) []byte { return b[:len(b)-tail] },
			"two":  func(b []byte) []byte { return append(b, index...) },
			"cut":  func(b []byte) []byte { return b[:len(b)-3] },
			"only a footer": func(b []byte) []byte {
				b = append(b[:len(b)-tail], index[:4]...)
				return append(binary.LittleEndian.AppendUint32(b, 9), index[len(index)-9:]...)
			},
			"a frame behind": func(b []byte) []byte { return append(b, encode(t, e, []byte("x"))[:20]...) },
			"frames of others": func([]byte) []byte {
				return compress(t, map[layer.Encoding]layer.Format{"zstd": layer.Zstd, "lz4": layer.LZ4}[e], tarball)
			},
			"small frames first": func(b []byte) []byte { return append(encode(t, e, nil), b...) },
		}
		for name, change := range cases {
			blob := change(bytes.Clone(good))
			spec := specOf(blob, tarball)
			spec.Indexed = true
			if _, err := newUnpacker(t, layer.Config{}).Unpack(t.Context(), bytes.NewReader(blob), spec, shm(t)); !errors.Is(err, layer.ErrCorrupt) {
				t.Errorf("%s, %s: error %v, want a corrupt layer", e, name, err)
			}
		}
	}
}

func FuzzIndex(f *testing.F) {
	for _, n := range []int{1, 3 * layer.FrameBytes} {
		blob := encode(f, layer.EncodingLZ4, make([]byte, n))
		f.Add(blob[len(blob)-8*(n/layer.FrameBytes+1)-9:])
	}
	f.Add([]byte{0, 0, 0, 0, 0x80, 0xb1, 0xea, 0x92, 0x8f})
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0, 0xb1, 0xea, 0x92, 0x8f})
	f.Fuzz(func(t *testing.T, payload []byte) {
		if n, err := layer.ParseIndex(payload); err == nil && n*8+9 > len(payload) {
			t.Errorf("%d entries in %d bytes", n, len(payload))
		}
	})
}

func FuzzEncoder(f *testing.F) {
	f.Add([]byte("text"), uint16(1), false)
	f.Add(mixed(700), uint16(900), true)
	u := newUnpacker(f, layer.Config{})
	f.Fuzz(func(t *testing.T, data []byte, times uint16, isLZ4 bool) {
		if len(data) == 0 {
			return
		}
		data = bytes.Repeat(data, int(times)%1500+1)
		data = data[:min(len(data), 3<<20)]
		e := encodings[0]
		if isLZ4 {
			e = encodings[1]
		}
		blob := encode(t, e, data)
		spec := specOf(blob, data)
		spec.Indexed = true
		var out bytes.Buffer
		if _, err := u.Decompress(t.Context(), bytes.NewReader(blob), spec, &out); err != nil || !bytes.Equal(out.Bytes(), data) {
			t.Errorf("%s: error %v", e, err)
		}
	})
}

// FuzzFrames gives hostile frames to the decoders: an error is fine, and so is any output within the bounds.
func FuzzFrames(f *testing.F) {
	small := mixed(5000)
	for _, e := range encodings {
		f.Add(encode(f, e, small))
	}
	f.Add(compress(f, layer.Zstd, small))
	f.Add(compress(f, layer.LZ4, small))
	f.Add(compressLZ4(f, small, lz4.SizeOption(5000), lz4.BlockChecksumOption(true)))
	f.Add([]byte{0x28, 0xb5, 0x2f, 0xfd, 0x20, 0x05, 0x2b, 0x00, 0x10, 'x'}) // a repeated block longer than its frame
	f.Add([]byte{0x5e, 0x2a, 0x4d, 0x18, 0xff, 0xff, 0xff, 0xff})
	large := bytes.Repeat([]byte("large"), 200_000)
	f.Add(append(windowed(f, large, 1<<20), compress(f, layer.Zstd, small)...))
	f.Add(windowed(f, large, 128<<20))
	f.Add(append(compressLZ4(f, large, lz4.BlockChecksumOption(true)), compressLZ4(f, small, lz4.SizeOption(5000))...))
	f.Add(compressLZ4(f, large, lz4.LegacyOption(true)))
	u := newUnpacker(f, layer.Config{Limits: layer.Limits{MaxBytes: 8 << 20}})
	f.Fuzz(func(t *testing.T, blob []byte) {
		spec := specOf(blob, blob)
		for _, spec.Indexed = range []bool{false, true} {
			if _, err := u.Decompress(t.Context(), bytes.NewReader(blob), spec, io.Discard); err != nil && !errors.Is(err, layer.ErrCorrupt) && !errors.Is(err, layer.ErrTooLarge) {
				t.Error(err)
			}
		}
	})
}

// BenchmarkFrames measures the decoders alone, on the frames of one tar.
func BenchmarkFrames(b *testing.B) {
	tarball := syntheticTar(b, 3000, 4)
	if name := os.Getenv("HEARTH_BENCH_TAR"); name != "" {
		var err error
		if tarball, err = os.ReadFile(name); err != nil {
			b.Fatal(err)
		}
	}
	for _, e := range encodings {
		blob := encode(b, e, tarball)
		for _, cores := range []int{1, 2} {
			b.Run(fmt.Sprintf("%s/cores=%d", e, cores), func(b *testing.B) {
				defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(cores))
				u := newUnpacker(b, layer.Config{})
				b.SetBytes(int64(len(tarball)))
				cpu := -cpuTime(b)
				for b.Loop() {
					if err := u.DecodeOnly(b.Context(), bytes.NewReader(blob)); err != nil {
						b.Fatal(err)
					}
				}
				cpu += cpuTime(b)
				b.ReportMetric(float64(len(tarball))*float64(b.N)/1e6/cpu.Seconds(), "MB/cpu-s")
				b.ReportMetric(float64(len(blob))/float64(len(tarball)), "ratio")
			})
		}
	}
}
