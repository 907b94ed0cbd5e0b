"""The dictionary that both ends prime SPDY/3 header compression with (draft-mbelshe-httpbis-spdy-00, 2.6.10.1).

The draft gives 1423 octets: first words, each behind its length in four octets, then text without lengths.
"""

from __future__ import annotations

import struct

_WORDS = (
    "options,head,post,put,delete,trace,accept,accept-charset,accept-encoding,accept-language,accept-ranges,a"
    "ge,allow,authorization,cache-control,connection,content-base,content-encoding,content-language,content-l"
    "ength,content-location,content-md5,content-range,content-type,date,etag,expect,expires,from,host,if-matc"
    "h,if-modified-since,if-none-match,if-range,if-unmodified-since,last-modified,location,max-forwards,pragm"
    "a,proxy-authenticate,proxy-authorization,range,referer,retry-after,server,te,trailer,transfer-encoding,u"
    "pgrade,user-agent,vary,via,warning,www-authenticate,method,get,status,200 OK,version,HTTP/1.1,url,public"
    ",set-cookie,keep-alive,origin"
)
_TEXT = (
    "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505203 Non-Author"
    "itative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden404 No"
    "t Found500 Internal Server Error501 Not Implemented503 Service UnavailableJan Feb Mar Apr May Jun Jul Au"
    "g Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMTchunked,text/html,image/png,image/jpg,"
    "image/gif,application/xml,application/xhtml+xml,text/plain,text/javascript,publicprivatemax-age=gzip,def"
    "late,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0."
)

DICTIONARY = b"".join(struct.pack(">I", len(word)) + word.encode() for word in _WORDS.split(",")) + _TEXT.encode()
