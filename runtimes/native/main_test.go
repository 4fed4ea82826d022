package main

import (
	"bufio"
	"errors"
	"io"
	"strings"
	"testing"
)

func FuzzRead(f *testing.F) {
	f.Add(`{"load":{"code":"/workspace","handler":"main","env":{"PORT":"8080"}}}` + "\n")
	f.Add(`{"thawed":{"seed":"","frozen":1.5}}` + "\n{}\n")
	f.Add(`{"load":{"code":1}}` + "\n")
	f.Add(strings.Repeat(" ", maxLine+2))
	f.Add(strings.Repeat("[", 1000) + "\n")
	f.Add("{")
	f.Fuzz(func(t *testing.T, text string) {
		lines := bufio.NewReader(strings.NewReader(text))
		for {
			_, err := read(lines)
			if errors.Is(err, io.EOF) || errors.Is(err, errMalformed) {
				return
			}
			if err != nil {
				t.Fatalf("%q: %v", text, err)
			}
		}
	})
}
