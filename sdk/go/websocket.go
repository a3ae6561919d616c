package msb

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/sha1"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
)

// The client's side of a WebSocket (RFC 6455), as much of it as the control API needs.

const (
	opText   = 1
	opBinary = 2
	opClose  = 8
	opPing   = 9
	opPong   = 10

	// messageLenMax is the largest message that is read, in bytes.
	messageLenMax = 8 << 20
	websocketGUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
)

type websocket struct {
	connection net.Conn
	reader     *bufio.Reader
	writing    sync.Mutex
}

// upgrade turns a fresh connection into a WebSocket.
func upgrade(ctx context.Context, connection net.Conn, target string) (*websocket, error) {
	stop := context.AfterFunc(ctx, func() { connection.Close() })
	defer stop()
	nonce := make([]byte, 16)
	if _, err := rand.Read(nonce); err != nil {
		return nil, err
	}
	key := base64.StdEncoding.EncodeToString(nonce)
	request, err := http.NewRequest(http.MethodGet, "http://msbd"+target, nil)
	if err != nil {
		return nil, protocolError(err)
	}
	for name, value := range map[string]string{
		"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": key,
	} {
		request.Header.Set(name, value)
	}
	if err := request.Write(connection); err != nil {
		return nil, lost(ctx, err)
	}
	reader := bufio.NewReaderSize(connection, 64<<10)
	response, err := http.ReadResponse(reader, request)
	if err != nil {
		return nil, lost(ctx, err)
	}
	if response.StatusCode != http.StatusSwitchingProtocols {
		defer response.Body.Close()
		body, _ := io.ReadAll(io.LimitReader(response.Body, answerLenMax))
		return nil, errorFromBody(response.StatusCode, body)
	}
	sum := sha1.Sum([]byte(key + websocketGUID))
	if response.Header.Get("Sec-WebSocket-Accept") != base64.StdEncoding.EncodeToString(sum[:]) {
		return nil, protocolError("it is no WebSocket")
	}
	return &websocket{connection: connection, reader: reader}, nil
}

func (w *websocket) send(opcode byte, data []byte) error {
	frame := make([]byte, 2, 14+len(data))
	frame[0] = 0x80 | opcode
	switch {
	case len(data) < 126:
		frame[1] = 0x80 | byte(len(data))
	case len(data) < 1<<16:
		frame[1] = 0x80 | 126
		frame = binary.BigEndian.AppendUint16(frame, uint16(len(data)))
	default:
		frame[1] = 0x80 | 127
		frame = binary.BigEndian.AppendUint64(frame, uint64(len(data)))
	}
	var mask [4]byte
	if _, err := rand.Read(mask[:]); err != nil {
		return err
	}
	frame = append(frame, mask[:]...)
	for index, value := range data {
		frame = append(frame, value^mask[index&3])
	}
	w.writing.Lock()
	defer w.writing.Unlock()
	_, err := w.connection.Write(frame)
	return err
}

var errMessageTooLong = errors.New("a message is too long")

// receive gives the next message, text or binary; io.EOF once the service has closed.
func (w *websocket) receive() (byte, []byte, error) {
	var kind byte
	var message []byte
	for {
		var head [2]byte
		if _, err := io.ReadFull(w.reader, head[:]); err != nil {
			return 0, nil, err
		}
		length := uint64(head[1] & 0x7f)
		if length >= 126 {
			var wide [8]byte
			size := 2
			if length == 127 {
				size = 8
			}
			if _, err := io.ReadFull(w.reader, wide[8-size:]); err != nil {
				return 0, nil, err
			}
			length = binary.BigEndian.Uint64(wide[:])
		}
		if length > messageLenMax || length+uint64(len(message)) > messageLenMax {
			return 0, nil, errMessageTooLong
		}
		data := make([]byte, length)
		if _, err := io.ReadFull(w.reader, data); err != nil {
			return 0, nil, err
		}
		switch opcode := head[0] & 0x0f; opcode {
		case opPing:
			if err := w.send(opPong, data); err != nil {
				return 0, nil, err
			}
		case opPong:
		case opClose:
			return 0, nil, io.EOF
		case 0, opText, opBinary:
			if opcode != 0 {
				kind = opcode
			}
			message = append(message, data...)
			if head[0]&0x80 != 0 {
				return kind, message, nil
			}
		default:
			return 0, nil, errors.New("a frame of an unknown kind")
		}
	}
}
