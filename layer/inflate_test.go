package layer

import (
	"bytes"
	"compress/flate"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"
)

// The inflater is tested from inside, since only here can a test choose where its input and its output are cut.

// inflateAll decodes raw deflate data that arrives in pieces, into pieces of about room bytes.
func inflateAll(data []byte, pieces func() int, room int) ([]byte, error) {
	var blocks []*block
	q := &quota{arena: newArena(0, nil), live: map[*block]struct{}{}}
	for rest := data; len(rest) > 0; {
		n := min(max(pieces(), 1), len(rest))
		b := &block{data: bytes.Clone(rest[:n]), quota: q, token: make(chan struct{}, 1)}
		b.refs.Store(1)
		blocks = append(blocks, b)
		rest = rest[n:]
	}
	ch := make(chan *block, len(blocks))
	for _, b := range blocks {
		ch <- b
	}
	close(ch)
	f := &inflater{src: &blockReader{ctx: context.Background(), blocks: ch, clock: &clock{}}}
	var out []byte
	dst := make([]byte, window+room+slack)
	for f.state != atEnd {
		n := copy(dst[window-min(window, len(out)):], out[max(0, len(out)-window):])
		op, err := f.decode(dst, window, window-n, window+room)
		out = append(out, dst[window:op]...)
		if err != nil {
			return out, err
		}
		if len(out) > 64<<20 {
			return out, io.ErrShortBuffer
		}
	}
	return out, nil
}

func TestInflateAgreesWithStandardLibrary(t *testing.T) {
	rnd := rand.New(rand.NewPCG(7, 8))
	random := func(n, letters int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(rnd.IntN(letters))
		}
		return b
	}
	skewed := make([]byte, 90_000) // long codes
	for i := range skewed {
		skewed[i] = byte(rnd.ExpFloat64() * 12)
	}
	runs := bytes.Repeat([]byte("abc"), 20_000)
	for d := 1; d < 40; d++ {
		runs = append(runs, bytes.Repeat(random(d, 256), 300)...)
	}
	far := random(32768, 256)
	far = append(append(far, random(7, 3)...), far...)
	inputs := map[string][]byte{
		"empty": nil, "one": {1}, "text": random(90_000, 20), "noise": random(60_000, 256), "skewed": skewed, "runs": runs,
		"zeros": make([]byte, 200_000), "far": far,
	}
	for name, want := range inputs {
		for _, level := range []int{flate.HuffmanOnly, flate.NoCompression, 1, 6, 9} {
			var buf bytes.Buffer
			w, err := flate.NewWriter(&buf, level)
			if err != nil {
				t.Fatal(err)
			}
			for rest := want; len(rest) > 0; {
				n := min(len(rest), 1+rnd.IntN(100_000))
				if _, err := w.Write(rest[:n]); err != nil {
					t.Fatal(err)
				}
				if rnd.IntN(3) == 0 {
					if err := w.Flush(); err != nil {
						t.Fatal(err)
					}
				}
				rest = rest[n:]
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			for _, piece := range []int{1, 300, 1 << 20} {
				t.Run(fmt.Sprintf("%s/level %d/pieces of %d", name, level, piece), func(t *testing.T) {
					got, err := inflateAll(buf.Bytes(), func() int { return rnd.IntN(2*piece) + 1 }, 1+rnd.IntN(100_000))
					if err != nil {
						t.Fatal(err)
					}
					if !bytes.Equal(got, want) {
						t.Errorf("%d bytes differ from the %d that were compressed", len(got), len(want))
					}
				})
			}
		}
	}
}

// FuzzInflate compares with the standard library on streams that no compressor would write.
func FuzzInflate(f *testing.F) {
	for _, level := range []int{0, 1, 9, flate.HuffmanOnly} {
		var buf bytes.Buffer
		w, _ := flate.NewWriter(&buf, level)
		_, _ = w.Write(bytes.Repeat([]byte("to be or not to be, "), 40))
		_ = w.Close()
		f.Add(buf.Bytes(), uint16(3), uint16(100))
		f.Add(buf.Bytes(), uint16(1000), uint16(9000))
	}
	f.Fuzz(func(t *testing.T, data []byte, piece, room uint16) {
		if len(data) > 4096 {
			return
		}
		want, werr := io.ReadAll(io.LimitReader(flate.NewReader(bytes.NewReader(data)), 32<<20))
		got, gerr := inflateAll(data, func() int { return int(piece) }, int(room)+2000)
		if (werr == nil) != (gerr == nil) {
			t.Fatalf("standard library: %d bytes, %v; here: %d bytes, %v", len(want), werr, len(got), gerr)
		}
		if werr == nil && !bytes.Equal(got, want) {
			t.Fatalf("%d and %d bytes differ", len(want), len(got))
		}
	})
}
