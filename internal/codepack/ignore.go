package codepack

import (
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// IgnoreFile in the folder to pack says what is left out. Its language is that of .gitignore, with two differences: there is one file
// only (those in folders below are code like any other), and ? is any character, not any byte.
const IgnoreFile = ".hearthignore"

const (
	maxIgnoreBytes = 1 << 20
	maxIgnoreLine  = 4096
	maxIgnoreLines = 4096

	byteOrderMark = "\ufeff" // which Windows' editors begin files with
)

// Tokens that are no rune.
const (
	globStar = -1 - iota
	globAny
	globSet
)

// ignore decides what is left out. The last pattern that fits a path says whether it is; what is in a folder that is left out is
// never asked about.
type ignore []pattern

// pattern is a line of the file.
type pattern struct {
	segments []segment // between slashes
	again    bool      // takes back in what earlier ones left out
	folder   bool      // is about folders alone
	base     bool      // is about the last name of a path, wherever that is
}

// segment is what one name in a path has to look like; nil stands for any number of names.
type segment []token

// token is a rune to be met, or one of the glob tokens.
type token struct {
	r   rune
	set *runeSet
}

// runeSet is what stands in brackets.
type runeSet struct {
	not    bool
	ranges []runeRange
	kinds  []func(rune) bool
}

type runeRange struct{ low, high rune }

func (s *runeSet) has(r rune) bool {
	in := slices.ContainsFunc(s.ranges, func(x runeRange) bool { return x.low <= r && r <= x.high }) ||
		slices.ContainsFunc(s.kinds, func(is func(rune) bool) bool { return is(r) })
	return in != s.not && r != '/'
}

// parseIgnore reads a file of patterns.
func parseIgnore(r io.Reader) (ignore, error) {
	data, err := io.ReadAll(io.LimitReader(r, maxIgnoreBytes+1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", IgnoreFile, err)
	}
	if len(data) > maxIgnoreBytes {
		return nil, fmt.Errorf("%s: more than %d bytes", IgnoreFile, maxIgnoreBytes)
	}
	var all ignore
	n := 0
	for line := range strings.Lines(strings.TrimPrefix(string(data), byteOrderMark)) {
		n++
		line = strings.TrimSuffix(strings.TrimSuffix(line, "\n"), "\r")
		switch {
		case n > maxIgnoreLines:
			return nil, fmt.Errorf("%s: more than %d lines", IgnoreFile, maxIgnoreLines)
		case len(line) > maxIgnoreLine:
			return nil, fmt.Errorf("%s, line %d: more than %d bytes", IgnoreFile, n, maxIgnoreLine)
		case !utf8.ValidString(line):
			return nil, fmt.Errorf("%s, line %d: not UTF-8", IgnoreFile, n)
		}
		if p, ok := parsePattern(line); ok {
			all = append(all, p)
		}
	}
	return all, nil
}

// parsePattern reads a line; what says nothing, and what git takes for a pattern that never fits, is not ok.
func parsePattern(line string) (p pattern, ok bool) {
	line = trimBlanks(line)
	if strings.HasPrefix(line, "#") {
		return p, false
	}
	line, p.again = strings.CutPrefix(line, "!")
	line, p.folder = strings.CutSuffix(line, "/")
	p.base = !strings.Contains(line, "/")
	line = strings.TrimPrefix(line, "/")
	if line == "" {
		return p, false
	}
	var err error
	p.segments, err = parseSegments([]rune(line))
	return p, err == nil
}

// trimBlanks takes away the blanks at the end, up to one that a backslash protects.
func trimBlanks(line string) string {
	kept := strings.TrimRight(line, " ")
	if backslashes := len(kept) - len(strings.TrimRight(kept, `\`)); backslashes%2 == 1 && len(kept) < len(line) {
		return line[:len(kept)+1]
	}
	return kept
}

var errNeverFits = errors.New("pattern never fits")

// parseSegments cuts a pattern at its slashes, those in brackets excepted.
func parseSegments(line []rune) (segments []segment, err error) {
	one := segment{}
	stars := 0 // if the segment so far is nothing else
	end := func() {
		if stars >= 2 && stars == len(one) {
			one = nil
		}
		segments, one, stars = append(segments, one), segment{}, 0
	}
	for i := 0; i < len(line); i++ {
		switch c := line[i]; c {
		case '/':
			end()
		case '*':
			one = append(one, token{r: globStar})
			stars++
		case '?':
			one = append(one, token{r: globAny})
		case '[':
			set, n, err := parseSet(line[i+1:])
			if err != nil {
				return nil, err
			}
			one, i = append(one, token{globSet, set}), i+n
		case '\\':
			if i++; i == len(line) {
				return nil, errNeverFits
			}
			if c = line[i]; c == '/' {
				end()
				continue
			}
			fallthrough
		default:
			one = append(one, token{r: c})
		}
	}
	end()
	return segments, nil
}

// setReader reads what is in brackets.
type setReader struct {
	in []rune
	at int
}

// parseSet reads what follows an opening bracket, and says how many runes that are with the closing one.
func parseSet(in []rune) (*runeSet, int, error) {
	s, r := &runeSet{}, &setReader{in: in}
	if len(in) > 0 && (in[0] == '!' || in[0] == '^') {
		s.not, r.at = true, 1
	}
	for first := true; ; first = false {
		if r.at < len(in) && in[r.at] == ']' && !first {
			return s, r.at + 1, nil
		}
		if name, ok := r.kind(); ok {
			is := runeKind(name)
			if is == nil {
				return nil, 0, errNeverFits
			}
			s.kinds = append(s.kinds, is)
			continue
		}
		x, err := r.runes()
		if err != nil {
			return nil, 0, err
		}
		s.ranges = append(s.ranges, x)
	}
}

// kind reads [:NAME:].
func (r *setReader) kind() (name string, ok bool) {
	rest := r.in[r.at:]
	if len(rest) < 2 || rest[0] != '[' || rest[1] != ':' {
		return "", false
	}
	end := slices.Index(rest, ']')
	if end < 3 || rest[end-1] != ':' {
		return "", false // a bracket like any other rune
	}
	r.at += end + 1
	return string(rest[2 : end-1]), true
}

// runes reads a rune, or a range of them.
func (r *setReader) runes() (runeRange, error) {
	low, err := r.one()
	if err != nil {
		return runeRange{}, err
	}
	if rest := r.in[r.at:]; len(rest) < 2 || rest[0] != '-' || rest[1] == ']' {
		return runeRange{low, low}, nil
	}
	r.at++
	high, err := r.one()
	return runeRange{low, max(low, high)}, err // git, too, takes the first of a range upside down
}

// one reads a rune, by itself or behind a backslash.
func (r *setReader) one() (rune, error) {
	if r.at < len(r.in) && r.in[r.at] == '\\' {
		r.at++
	}
	if r.at >= len(r.in) {
		return 0, errNeverFits
	}
	r.at++
	return r.in[r.at-1], nil
}

// runeKind is what [:NAME:] stands for, or nil.
func runeKind(name string) func(rune) bool {
	return map[string]func(rune) bool{
		"alpha":  unicode.IsLetter,
		"digit":  unicode.IsDigit,
		"alnum":  func(r rune) bool { return unicode.IsLetter(r) || unicode.IsDigit(r) },
		"upper":  unicode.IsUpper,
		"lower":  unicode.IsLower,
		"space":  unicode.IsSpace,
		"blank":  func(r rune) bool { return r == ' ' || r == '\t' },
		"punct":  func(r rune) bool { return unicode.IsPunct(r) || unicode.IsSymbol(r) },
		"cntrl":  unicode.IsControl,
		"graph":  func(r rune) bool { return unicode.IsGraphic(r) && !unicode.IsSpace(r) },
		"print":  unicode.IsPrint,
		"xdigit": func(r rune) bool { return strings.ContainsRune("0123456789abcdefABCDEF", r) },
	}[name]
}

// leavesOut says whether a path, below the folder to pack, is left out.
func (ig ignore) leavesOut(name string, folder bool) bool {
	if alwaysOut(name) {
		return true
	}
	if len(ig) == 0 {
		return false
	}
	names := strings.Split(name, "/")
	for _, p := range slices.Backward(ig) {
		if p.fits(names, folder) {
			return !p.again
		}
	}
	return false
}

// alwaysOut says whether a path has no business in a package, whatever the file says.
func alwaysOut(name string) bool {
	dir, base := path.Split(name)
	switch base {
	case ".git", "__pycache__":
		return true
	case ".cache":
		return path.Base(dir) == "node_modules"
	}
	return name == IgnoreFile
}

func (p pattern) fits(names []string, folder bool) bool {
	switch {
	case p.folder && !folder:
		return false
	case p.base:
		return p.segments[0] == nil || p.segments[0].fits(names[len(names)-1])
	}
	return fitsPath(p.segments, names)
}

// fitsPath matches segments and names one to one, with backtracking to the last segment of any depth only: what an earlier one
// could take more is no help to what follows a later one. A last one wants a name at least.
func fitsPath(segments []segment, names []string) bool {
	s, n, deep, mark := 0, 0, -1, 0
	for n < len(names) {
		switch {
		case s < len(segments) && segments[s] == nil:
			deep, mark = s, n
			s++
			if s == len(segments) {
				return true
			}
		case s < len(segments) && segments[s].fits(names[n]):
			s++
			n++
		case deep >= 0:
			mark++
			s, n = deep+1, mark
		default:
			return false
		}
	}
	return s == len(segments)
}

// fits matches a name, with backtracking to the last star only.
func (g segment) fits(name string) bool {
	runes := []rune(name)
	t, n, star, mark := 0, 0, -1, 0
	for n < len(runes) {
		switch {
		case t < len(g) && g[t].r == globStar:
			star, mark = t, n
			t++
		case t < len(g) && g[t].fits(runes[n]):
			t++
			n++
		case star >= 0:
			mark++
			t, n = star+1, mark
		default:
			return false
		}
	}
	for t < len(g) && g[t].r == globStar {
		t++
	}
	return t == len(g)
}

func (t token) fits(r rune) bool {
	switch t.r {
	case globAny:
		return true
	case globSet:
		return t.set.has(r)
	}
	return t.r == r
}
